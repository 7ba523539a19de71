"""A command of experiments of which one rank is killed, the first time, inside of a step or of a save."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch.overrides import TorchFunctionMode

import dash_shampoo
from experiments.main import main

# In the middle of a step: its factor matrices are updated, its parameters are not.
NUM_OPERATIONS = 20


class Countdown(TorchFunctionMode):
    """Kills this process at an operation."""

    left = NUM_OPERATIONS

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **(kwargs or {}))


def die_in_step(number):
    step = dash_shampoo.DashShampoo.step
    steps = []

    def counted(self, closure=None):
        steps.append(self)
        if len(steps) != number:
            return step(self, closure)
        with Countdown():
            step(self, closure)
        raise AssertionError(f"the step had fewer than {NUM_OPERATIONS} operations")

    dash_shampoo.DashShampoo.step = counted


def die_in_save(event_name, number):
    folder = f"tmp_step_{number:08d}"

    def hook(event, arguments):
        if event == event_name and folder in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(place, rank, number, words):
    """What a rank of torchrun's agent does.

    Args:
        place: "step", or the event of Python's audit hooks before which the rank dies: "open", "os.rename".
        rank: Who dies.
        number: The optimizer's step, by count; or the step whose checkpoint is written.
        words: The command and its settings.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if os.environ["RANK"] == str(rank) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if place == "step":
            die_in_step(number)
        else:
            die_in_save(place, number)
    assert main(words) == 0
