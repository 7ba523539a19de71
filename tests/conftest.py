"""What holds for the whole suite."""

from pathlib import Path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Doctests are looked for in every module, but the helpers and scripts of the tests hold none."""
    is_helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if is_helper and collection_path.name != "__init__.py" else None
