"""What the checks before a step cost: memory, settings, gradients and ambient state are looked at.

    python benchmarks/checks.py --case 146-of-64

One optimizer takes steps without a refresh, every other one with the checks left out, in an order that is
reversed every round; given is the ratio of the processor's times, median of the rounds.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from benchmarks.cases import CASES, Case, make_gradients, make_parameters, set_gradients
from benchmarks.peers import NEVER
from benchmarks.step_time import processor


class Unchecked(ds.DashShampoo):
    """`DashShampoo`, whose checks can be switched off."""

    is_checked = True

    def _follow(self) -> None:
        if self.is_checked:
            super()._follow()

    def _neutral(self) -> AbstractContextManager[Any]:
        return super()._neutral() if self.is_checked else torch.no_grad()

    def _look_for_gradients(self) -> None:
        if self.is_checked:
            super()._look_for_gradients()

    def _check_mode(self) -> None:
        if self.is_checked:
            super()._check_mode()


def measure(case: Case, rounds: int) -> tuple[float, list[float]]:
    """Median milliseconds of a checked step, and its ratio to one without checks, by round."""
    values = make_parameters(case, "cpu")
    params = [torch.nn.Parameter(value) for value in values]
    set_gradients(params, make_gradients(values, 0))
    optimizer = Unchecked(
        params,
        lr=1e-3,
        max_preconditioner_dim=case.block,
        precondition_frequency=NEVER,
        grafting_config=ds.AdamPreconditionerConfig(),
        preconditioner_config=ds.DefaultDashConfig,
    )
    for _ in range(5):
        optimizer.step()
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for is_checked in (True, False) if number % 2 else (False, True):
            optimizer.is_checked = is_checked
            start = time.process_time()
            optimizer.step()
            times[is_checked].append((time.process_time() - start) * 1e3)
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    return statistics.median(times[True]), ratios


def main(words: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--case", choices=list(CASES), default="146-of-64", help="parameters")
    parser.add_argument("--rounds", type=int, default=500, help="pairs of steps")
    parser.add_argument("--output", type=Path, help="a file to which the result is added")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.empty(31 * 2**18)  # as in step_time.py
    milliseconds, ratios = measure(CASES[options.case], options.rounds)
    low, middle, high = statistics.quantiles(ratios, n=4)
    text = (
        f"a step without a refresh: {milliseconds:.2f} ms on the {ds.base.name} base; "
        f"with ÷ without checks {middle:.3f} [{low:.3f}, {high:.3f}]"
    )
    print(text)
    if options.output:
        is_new = not options.output.exists()
        with options.output.open("a") as file:
            file.write(_head(words) if is_new else "")
            file.write(f"- {text}\n")
    return text


def _head(words: Sequence[str]) -> str:
    command = " ".join(["python benchmarks/checks.py", *words])
    return (
        "# What the checks before a step cost\n\n"
        f"{date.today()}, {processor('cpu')}, 1 thread; dash_shampoo {ds.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}; `{command}`, on each base. fp32, Adam "
        "grafting, DefaultDashConfig. Medians of pairs of steps of one optimizer, with and without the "
        "checks in turn, by the processor's time; in brackets the quartiles.\n\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
