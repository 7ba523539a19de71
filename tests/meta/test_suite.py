"""The runner of Meta's own tests fails where its result would say nothing about DashShampoo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("distributed_shampoo", reason="Meta's package is not importable")

SUITE = Path(__file__).with_name("suite.py")
STEP = """
import torch
{imports}
def test_step():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = DistributedShampoo([parameter])
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
"""
OURS = "from distributed_shampoo import DistributedShampoo"
THEIRS = "import dash_shampoo; DistributedShampoo = dash_shampoo.DistributedShampoo"


@pytest.mark.parametrize(
    ("source", "status", "output"),
    [
        (STEP.format(imports=OURS), 0, ["tests: 1 passed", "1 substituted", "steps: 1 stacked"]),
        (
            STEP.format(imports=THEIRS),
            1,
            ["error: a test module has Meta's class", "error: a step was taken by Meta's class"],
        ),
        ("", 5, ["error: no test passed", "error: no step was taken with stacked blocks"]),
        (STEP.format(imports=OURS) + "    assert False\n", 1, ["1 failed"]),
    ],
    ids=["substituted", "not substituted", "nothing ran", "a test failed"],
)
def test_what_the_runner_says(tmp_path, source, status, output):
    # Folders without __init__.py do not hide the package.
    for folder in ("tests", "gpu_tests"):
        (tmp_path / "distributed_shampoo" / folder).mkdir(parents=True)
    (tmp_path / "distributed_shampoo" / "tests" / "a_test.py").write_text(source)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, SUITE, tmp_path],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    for line in output:
        assert line in done.stdout


def test_a_folder_that_is_no_checkout(tmp_path):
    done = subprocess.run(
        [sys.executable, SUITE, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "META must be a checkout" in done.stdout
