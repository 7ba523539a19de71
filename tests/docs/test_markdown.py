"""What README.md and the pages of the documentation show is run, or at least exists."""

import re

import pytest

from experiments.main import COMMANDS
from tests.docs.markdown import ROOT, Block, blocks, commands, make_targets, table

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "patches/README.md", *PAGES]
WITHOUT_COMMANDS = (
    "docs/coming-from.md",
    "docs/robustness.md",
    "docs/limits.md",
    "docs/guides.md",
    "docs/questions.md",
)
# Blocks that need several processes, a GPU or Meta's package: ```python notest, compiled only.
NOT_RUN = "notest"


def python_blocks(document: str) -> list[Block]:
    return [b for b in blocks((ROOT / document).read_text()) if b.info.split(" ")[0] == "python"]


def run_blocks(found: list[Block], name: str) -> int:
    """Runs the blocks one after the other in one namespace; returns how many were run."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    count = 0
    for block in found:
        # Empty lines before the text let a traceback show the line of the document.
        code = compile("\n" * (block.line - 1) + block.text, name, "exec")
        if NOT_RUN not in block.info.split(" "):
            exec(code, namespace)
            count += 1
    return count


WITH_PYTHON = [document for document in DOCUMENTS if python_blocks(document)]


def test_documents_are_found():
    assert len(PAGES) >= 15
    # The pages into which the README's recipes and examples went.
    assert {"README.md", "docs/index.md", "docs/coming-from.md", "docs/solvers.md"} <= set(
        WITH_PYTHON
    )


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_of_a_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = python_blocks(document)
    shown = [block for block in found if NOT_RUN in block.info.split(" ")]
    assert run_blocks(found, document) == len(found) - len(shown)


def test_a_broken_block_fails():
    assert run_blocks(blocks("```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n"), "ok") == 2
    with pytest.raises(AssertionError):
        run_blocks(blocks("```python\nassert False\n```\n"), "bad")
    with pytest.raises(SyntaxError):
        run_blocks(blocks("```python notest\nx = = 1\n```\n"), "bad")
    with pytest.raises(ValueError, match="never closed"):
        blocks("```python\n")


def unknown_commands(text: str, targets: set[str]) -> list[str]:
    """What a document tells the reader to call and does not exist."""
    wrong = []
    for words in commands(text):
        program, *arguments = words
        if program == "make":
            names = [a for a in arguments if "=" not in a and a[0] not in "-$"]
            wrong += [f"make {name}" for name in names if name not in targets]
        elif "experiments" in arguments and arguments[-1] != "experiments":
            command, *settings = arguments[arguments.index("experiments") + 1 :]
            if command not in COMMANDS:
                wrong.append(f"experiments {command}")
            wrong += [a for a in settings if not has_option_file(a)]
        elif program in ("python", "bash"):
            paths = [a for a in arguments if re.fullmatch(r"[\w./-]+\.(py|sh)|\.ci/run", a)]
            wrong += [path for path in paths[:1] if not (ROOT / path).is_file()]
    return wrong


def has_option_file(argument: str) -> bool:
    """Whether `group=name,name` names YAML files, for the groups that are folders of configs/."""
    group, _, names = argument.lstrip("+").partition("=")
    folder = ROOT / "configs" / group
    return (
        not names
        or not folder.is_dir()
        or all((folder / f"{name}.yaml").is_file() for name in names.split(","))
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    text = (ROOT / document).read_text()
    if "reference" not in document and document not in WITHOUT_COMMANDS:
        assert list(commands(text)), f"{document} shows no command"
    assert unknown_commands(text, make_targets((ROOT / "Makefile").read_text())) == []


def test_unknown_commands_are_found():
    text = """Run `make nothing` or `make test ARGS="-x"`, `python -m experiments nothing`.

```sh
$ git clone x && make other PYTHON=python3.12  # make comment
OMP_NUM_THREADS=1 python benchmarks/nothing.py --threads 2
```
"""
    expected = ["make other", "benchmarks/nothing.py", "make nothing", "experiments nothing"]
    assert unknown_commands(text, {"test"}) == expected
    assert {"test", "lint", "demo", "help", "install-meta"} <= make_targets(
        (ROOT / "Makefile").read_text()
    )


def broken_links(document: str, text: str) -> list[str]:
    """Relative links whose file does not exist; addresses and anchors are not followed."""
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text)
    here = (ROOT / document).parent
    return [t for t in targets if "://" not in t and not (here / t).exists()]


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    assert broken_links(document, (ROOT / document).read_text()) == []


def test_broken_links_are_found():
    text = "[a](README.md) [b](nothing.md#x) [c](https://example.org/x) [d](#anchor)"
    assert broken_links("README.md", text) == ["nothing.md"]


def test_layering_table_of_contributing_is_the_tested_one():
    from tests.test_layering import MAY_IMPORT

    rows = table((ROOT / "CONTRIBUTING.md").read_text(), "Room")
    names = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[-1])) for row in rows if row[0] != ""
    }
    assert names == MAY_IMPORT
