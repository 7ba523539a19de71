"""What holds for the whole suite."""

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import dash_shampoo

_MADE_ONCE = {"interpreted", "report"}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Doctests are looked for in every module, but the helpers and scripts of the tests hold none."""
    is_helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if is_helper and collection_path.name != "__init__.py" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what takes half a minute to make run on one worker, so that it is made once."""
    for item in items:
        for name in _MADE_ONCE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish() -> None:
    """Sets what was imported and collected apart: a garbage collection would look at it for half a second."""
    import torch._dynamo  # noqa: F401 -- the first optimizer would import it

    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What is set apart would be called leaked at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def every_warning_is_logged() -> None:
    """Undoes what a test before this one, or a worker's module, has silenced."""
    logging.disable(logging.NOTSET)
    logging.getLogger("dash_shampoo").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def the_default_of_everybody_stays_as_it_is() -> Iterator[None]:
    """Meta's own class writes into the config that it is given, also where that is the default."""
    config = dash_shampoo.DefaultSingleDeviceDistributedConfig
    before = config.target_parameter_dimensionality
    yield
    config.target_parameter_dimensionality = before
