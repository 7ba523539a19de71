"""Many steps leave memory as it was and state bound to its stacks; the long run is `benchmarks/soak.py`."""

from dataclasses import replace

import pytest
import torch

from benchmarks.ours import CONFIGS
from benchmarks.soak import (
    REFRESH_EVERY,
    Soak,
    Window,
    complaints,
    main,
    slowdown,
    soak,
    state_tensors,
)
from tests.processes import run_apart


@pytest.mark.parametrize("name", ["default", "newton_db"])
def test_memory_is_flat_and_state_stays_bound(name):
    """In a process of its own: objects are counted one by one, and other tests leave some behind."""
    windows, found = run_apart(soak, name, steps=120, num_windows=4)
    assert (found, len(windows)) == ([], 4)
    assert windows[-1].tensor_bytes > 0


def test_every_state_tensor_is_looked_at():
    run = Soak(CONFIGS["default"].make())
    for _ in range(REFRESH_EVERY + 1):
        run.step()
    names = {part for path in run.addresses() for part in path if isinstance(part, str)}
    assert {"factor_matrices", "inv_factor_matrices", "filtered_grad", "adagrad", "step"} <= names
    assert run.unbound() == []


def test_a_state_tensor_that_is_replaced_is_found():
    run = Soak(CONFIGS["default"].make())
    run.step()
    before = run.addresses()
    path, factor = next(
        (path, tensor)
        for path, tensor in state_tensors(list(run.optimizer.state.values()))
        if "factor_matrices" in path
    )
    factor.set_(torch.zeros_like(factor))
    assert [p for p, address in run.addresses().items() if address != before[p]] == [path]
    assert run.unbound() == [path]


FLAT = [Window(1.0, 2**28, 10, 1000, 5000)] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": 11}, "tensors: 10 at the end of the second window, 11 later"),
        ({"tensor_bytes": 1004}, "tensor_bytes: 1000"),
        ({"objects": 5001}, "objects: 5000"),
        ({"resident": 2**29}, "resident memory grew"),
    ],
)
def test_growth_is_found(change, message):
    assert complaints(FLAT, [], []) == []
    (found,) = complaints([*FLAT[:5], replace(FLAT[5], **change)], [], [])
    assert message in found


def test_a_slowdown_is_found():
    assert slowdown(FLAT) == []
    (found,) = slowdown([*FLAT[:3], *[replace(w, milliseconds=1.5) for w in FLAT[3:]]])
    assert "1.00 ms in the first half, 1.50 ms in the second" in found


def test_the_table(capsys):
    main(["--steps", "60", "--windows", "3", "--configs", "eigen"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("eigen, 60 steps")
    assert sum(line.startswith("| ") for line in lines) == 4


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "20", "--windows", "3"])
    assert "--steps 20 --windows 3: too few" in capsys.readouterr().err
