"""The bars that the figures of `gpu.py` are held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.step_time import Variant, table

# By N, how many times faster than torch's fp32 the square of fp32's accuracy is to be.
SPLIT_GAINS = {256: 1.5, 512: 2.5, 1024: 3.0, 2048: 4.0}
# By N, the same for half precision against torch's product alone.
HALF_GAINS = {64: 1.0, 128: 1.0, 256: 1.0, 512: 1.0, 2048: 1.4}
# Of the device's rate, inside the roots of large matrices.
LEAST_SHARE = 0.7
MOST_MILLISECONDS = 60.0
# By case: a rival, and how much of its time a step that refreshes may take at most.
MOST_OF_RIVAL = {"llama-953m-1024": ("base/coupled_newton", 0.1), "gpt2-124m": ("Muon", 1.2)}


def _row(text: str, bar: str, reached: str, is_met: bool) -> list[str]:
    return [text, bar, reached, "yes" if is_met else "**no**"]


def bar_table(
    kernels: Sequence[Mapping[str, Any]],
    shares: Mapping[str, float],
    steps: Mapping[str, Sequence[Variant]],
) -> str:
    """What was to be reached, what was, and whether that suffices; a bar without its figure is left out.

    Args:
        kernels: Rows of all kernels; squares have milliseconds: "ours", "fp32", and of torch's product alone
            "bmm".
        shares: Of the device's rate, by solver, on matrices of 1024 and more.
        steps: The optimizers of each case.

    Returns:
        A table in Markdown.
    """
    wrong = sum(not row["is_right"] for row in kernels)
    rows = [_row("results of kernels that are wrong", "0", str(wrong), wrong == 0)]
    squares = [row for row in kernels if row["kernel"] == "square"]
    for precision, gains, rival in (("fp16x3", SPLIT_GAINS, "fp32"), ("fp16", HALF_GAINS, "bmm")):
        for row in squares:
            least = gains.get(row["N"])
            if row["precision"] == precision and least and "ours" in row:
                gain = row[rival] / row["ours"]
                text = f"{precision} square of {row['N']}, times as fast as {rival}"
                rows.append(_row(text, f"{least}", f"{gain:.2f}", gain >= least))
    for solver, share in shares.items():
        text = f"roots by {solver}, of the device's rate"
        rows.append(_row(text, f"{LEAST_SHARE:.0%}", f"{share:.0%}", share >= LEAST_SHARE))
    for case, (rival, most) in MOST_OF_RIVAL.items():
        times = {v.name: statistics.median(v.times[1]) for v in steps.get(case, ())}
        if "ours/default" not in times:
            continue
        if rival in times:
            ratio = times["ours/default"] / times[rival]
            text = f"{case}, default, every step, ÷ {rival}"
            rows.append(_row(text, f"at most {most}", f"{ratio:.2f}", ratio <= most))
        if case == "llama-953m-1024":
            ms = times["ours/default"]
            text = f"{case}, default, every step, ms"
            is_met = ms <= MOST_MILLISECONDS
            rows.append(_row(text, f"at most {MOST_MILLISECONDS:.0f}", f"{ms:.1f}", is_met))
    return table(["Bar", "to reach", "reached", "met"], rows)
