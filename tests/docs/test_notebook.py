"""The notebook runs from top to bottom, and shows what it prints."""

import contextlib
import io
import json
import os
import re

import pytest

from tests.docs.markdown import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "five_minutes.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def words(text):
    """What does not depend on rounding."""
    return re.sub(r"\d+\.\d+", "x", text)


def test_the_notebook_runs_and_prints_what_it_shows():
    assert (NOTEBOOK["nbformat"], len(CODE)) == (4, 4)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        shown = "".join(text for output in cell["outputs"] for text in output["text"])
        assert cell["execution_count"] == number
        assert words(printed.getvalue()) == words(shown)
    # Both begin near 0.05.
    assert max(namespace["loss_dash"], namespace["loss_adamw"]) < 0.01


def test_it_runs_in_a_kernel_of_jupyter(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.reads(json.dumps(NOTEBOOK), as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in ran
    ]
    shown = [
        "".join(text for output in cell["outputs"] for text in output["text"]) for cell in CODE
    ]
    assert [words(text) for text in printed] == [words(text) for text in shown]
