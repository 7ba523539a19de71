"""How even the steps are whose refreshes are spread over an interval (`stagger_refresh`).

    python benchmarks/stagger.py --case 146-of-64 --frequency 10

Both optimizers, one that refreshes all roots in one step of an interval and one that refreshes a share in
each, take their steps in turns. Of every position in the interval the median of the processor's time is
taken over all intervals; given are the mean and the slowest of these.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from benchmarks.cases import CASES, make_gradients, make_parameters, set_gradients


def measure(case_name: str, frequency: int, intervals: int) -> dict[bool, list[float]]:
    """Milliseconds of a step by its position in the interval.

    Args:
        case_name: Of `CASES`.
        frequency: Steps of an interval.
        intervals: How many are timed, after one that is not.

    Returns:
        The medians, without and with `stagger_refresh`.
    """
    case = CASES[case_name]
    values = make_parameters(case, "cpu")
    running = {}
    for is_staggered in (False, True):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        running[is_staggered] = (
            params,
            ds.DashShampoo(
                params,
                lr=1e-3,
                max_preconditioner_dim=case.block,
                precondition_frequency=frequency,
                grafting_config=ds.AdamPreconditionerConfig(),
                preconditioner_config=replace(ds.DefaultDashConfig, stagger_refresh=is_staggered),
            ),
        )
    times: dict[bool, list[list[float]]] = {key: [[] for _ in range(frequency)] for key in running}
    for step in range(frequency * (intervals + 1)):
        gradients = make_gradients(values, seed=step)
        for is_staggered, (params, optimizer) in running.items():
            set_gradients(params, gradients)
            start = time.process_time()
            optimizer.step()
            elapsed = (time.process_time() - start) * 1e3
            if step > frequency:
                times[is_staggered][(step + 1) % frequency].append(elapsed)
    return {key: [statistics.median(one) for one in by] for key, by in times.items()}


def main(words: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--case", choices=list(CASES), default="146-of-64", help="parameters")
    parser.add_argument("--frequency", type=int, default=10, help="steps of an interval")
    parser.add_argument("--intervals", type=int, default=30, help="intervals that are timed")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.empty(31 * 2**18)  # as in step_time.py
    lines = ["| refreshes | mean, ms | slowest, ms | slowest / mean |", "| - | -: | -: | -: |"]
    for is_staggered, times in measure(options.case, options.frequency, options.intervals).items():
        mean, slowest = statistics.fmean(times), max(times)
        name = "a share in every step" if is_staggered else "all in one step"
        lines.append(f"| {name} | {mean:.1f} | {slowest:.1f} | {slowest / mean:.2f} |")
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
