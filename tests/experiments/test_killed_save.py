"""A process that is killed at any point of saving a checkpoint leaves one that can be continued from."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import dash_shampoo as ds
from experiments import checkpoint
from tests.experiments.test_train import tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills copies of this process")

# What Python tells its audit hooks before it changes something in a folder.
EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


class Points:
    """Counts what happens in a folder, and kills this process before the event of a number.

    Between the events "open" of a checkpoint's main file and the next one its bytes are written: half
    of them and all of them are points of their own.

    Args:
        folder: The folder.
        fatal: Number of the event, from 0; None only counts.
    """

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.names: list[str] = []
        self._folder = str(folder)
        self._fatal = fatal
        self._save = torch.save
        sys.addaudithook(self._hook)
        torch.save = self._save_in_halves

    def _hook(self, event, arguments):
        if event not in EVENTS:
            return
        # What a folder holds is removed by names relative to it.
        is_relative = event in {"os.remove", "os.rmdir"} and arguments[-1] != -1
        if is_relative or str(arguments[0]).startswith(self._folder):
            self._pass(f"{event} {Path(str(arguments[0])).name}")

    def _save_in_halves(self, value, file):
        content = io.BytesIO()
        self._save(value, content)
        half = len(content.getvalue()) // 2
        file.write(content.getvalue()[:half])
        file.flush()
        self._pass("half")
        file.write(content.getvalue()[half:])
        file.flush()
        self._pass("written")

    def _pass(self, name):
        if len(self.names) == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


def trained(steps):
    """A model and an optimizer after so many steps, the same in every call."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    optimizer = ds.DashShampoo(
        model.parameters(), lr=0.1, precondition_frequency=2, max_preconditioner_dim=4
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(folder, steps, model, optimizer):
    progress = {"configured": checkpoint.plain_groups(trained(0)[1])}
    return checkpoint.save(folder, steps, model, optimizer, progress)


def in_a_copy(function):
    """Runs a function in a copy of this process; returns the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def assert_continues(folder, expected):
    """The newest checkpoint is whole, and is that of one of the steps expected."""
    checkpoint.tidy(folder)
    assert {path.name.partition("_")[0] for path in folder.iterdir()} == {"step"}
    newest = checkpoint.newest_first(folder)[0]
    document = checkpoint.read(newest)
    assert document["step"] in expected
    model, optimizer = trained(0)
    configured = checkpoint.plain_groups(optimizer)
    checkpoint.restore(newest, document, model, optimizer, configured)
    wanted_model, wanted_optimizer = expected[document["step"]]
    for found, wanted in (
        (model.state_dict(), wanted_model.state_dict()),
        (optimizer.state_dict(), wanted_optimizer.state_dict()),
    ):
        pairs = dict(tensors(found)), dict(tensors(wanted))
        assert pairs[0].keys() == pairs[1].keys()
        assert [key for key in pairs[0] if not torch.equal(pairs[0][key], pairs[1][key])] == []
    return document["step"]


@pytest.mark.parametrize("is_replaced", [False, True], ids=["a new step", "a step saved again"])
def test_killed_at_any_point_of_a_save(tmp_path, is_replaced):
    states = {steps: trained(steps) for steps in (2, 3)}
    log = tmp_path / "points"

    def attempt(folder, fatal):
        save(folder, 2, *states[2])
        if is_replaced:
            save(folder, 3, *states[3])

        def work():
            points = Points(folder, fatal)
            save(folder, 3, *states[3])
            log.write_text("\n".join(points.names))

        return in_a_copy(work)

    assert attempt(tmp_path / "whole", None) == 0
    names = log.read_text().splitlines()
    assert {"half", "written", "open state.pt"} <= set(names)
    assert ("os.remove state.pt" in names) == is_replaced
    assert sum(name.startswith("os.rename") for name in names) == 1 + is_replaced
    reached = []
    for fatal in range(len(names)):
        folder = tmp_path / f"killed_{fatal}"
        assert attempt(folder, fatal) == signal.SIGKILL
        reached.append(assert_continues(folder, states))
    assert reached == ([3] * len(names) if is_replaced else [2] * len(names))
