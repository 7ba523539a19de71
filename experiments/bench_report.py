"""The result of ``bench`` as a table, a picture, and beside the paper's figures."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt

from benchmarks.phases import PHASES
from benchmarks.step_time import ratio
from experiments.paper_table import LISTS, PAPER_MS
from experiments.tables import markdown_table

_COLOURS = ("#56b4e9", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#bdbdbd")


class Result(Protocol):
    """One optimizer at one setting, as `experiments.bench.Measured`."""

    name: str
    setting: str
    block: int
    frequency: int
    milliseconds: list[float]
    phases: dict[str, float]

    @property
    def median(self) -> float:
        """Of the rounds."""


def write(
    found: Sequence[Result], options: argparse.Namespace, machine: Mapping[str, Any], out: Path
) -> str:
    """Write README.md and bench.png.

    Args:
        found: What was measured.
        options: Of the command.
        machine: Versions and hardware.
        out: The folder.

    Returns:
        The text.
    """
    ranks = f"{machine['world_size']} ranks" if machine["world_size"] > 1 else "one rank"
    if options.share > 1 and machine["world_size"] == 1:
        ranks += f" with the part of one of {options.share}"
    parts = [
        "# Time of an optimizer step\n",
        f"{options.model}, vocabulary {options.vocab:,}, {ranks}; {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, base {machine['base']}, dash_shampoo "
        f"{machine['dash_shampoo']}. Medians of {options.rounds} interleaved rounds after "
        f"{options.warmup}, time by {options.clock}; fp32 gradients, Adam grafting. Ratios are medians "
        "of the rounds' ratios, from four rounds on with quartiles: below 1, the row is the faster.\n",
        _times(found),
        _phases(found),
    ]
    if options.paper:
        parts.append(_beside_the_paper(found))
    _draw(found, out / "bench.png")
    parts.append("![time of a step by phase](bench.png)\n")
    text = "\n".join(parts)
    (out / "README.md").write_text(text, encoding="utf-8")
    return f"{text}\nWritten: {shlex.quote(str(out))}/README.md, bench.json, bench.png"


def _times(found: Sequence[Result]) -> str:
    header = ["setting", "block", "every", "optimizer", "ms", "÷ base", "÷ layer-wise"]
    rows = []
    for one in found:
        same = {
            x.name: x
            for x in found
            if (x.setting, x.block, x.frequency) == (one.setting, one.block, one.frequency)
        }
        cells = [
            ratio(one.milliseconds, same[name].milliseconds)
            if name in same and LISTS.index(name) < _rank(one.name)
            else "–"
            for name in ("base", "layer_wise")
        ]
        rows.append(
            [one.setting, str(one.block), str(one.frequency), one.name, f"{one.median:.1f}", *cells]
        )
    return markdown_table(header, rows)


def _rank(name: str) -> int:
    """The place among our lists; peers are compared with all of them."""
    return LISTS.index(name) if name in LISTS else len(LISTS)


def _phases(found: Sequence[Result]) -> str:
    rows = [
        [
            f"{one.setting}, {one.block}, every {one.frequency}: {one.name}",
            *(f"{one.phases[phase]:.2f}" for phase in PHASES),
        ]
        for one in found
        if one.phases
    ]
    return (
        "Milliseconds by phase, means over steps apart from those above; *communication* holds the "
        "addition of the updates to the parameters, *rest* the moving averages.\n\n"
        + markdown_table(["", *PHASES], rows)
    )


def _beside_the_paper(found: Sequence[Result]) -> str:
    """Every cell: the paper's figure, ours, and the gain over Distributed Shampoo in each."""
    rows = []
    for (block, setting, frequency), figures in PAPER_MS.items():
        here = {
            one.name: one.median
            for one in found
            if (one.setting, one.block, one.frequency) == (setting, block, frequency)
        }
        if not here:
            continue
        cells = [
            f"{'–' if figure is None else f'{figure:.0f}'} / "
            f"{f'{here[name]:.1f}' if name in here else '–'}"
            for name, figure in zip(LISTS, figures, strict=True)
        ]
        theirs = "–" if figures[0] is None else f"{figures[0] / figures[2]:.2f}"
        ours = f"{here['base'] / here['whole']:.2f}" if {"base", "whole"} <= here.keys() else "–"
        rows.append([f"{block}, {setting}, every {frequency}", *cells, f"{theirs} / {ours}"])
    header = ["paper / here, ms", "Distributed Shampoo", "layer-wise", "whole", "gain of whole"]
    return (
        "The paper's figures (arXiv 2602.02016, eight H100, TF32 allowed) beside those of this machine. "
        "It had Newton-DB and half precision in a fork of Distributed Shampoo; the base has neither.\n\n"
        + markdown_table(header, rows)
    )


def _draw(found: Sequence[Result], path: Path) -> None:
    labels = [f"{x.setting}, {x.block}, every {x.frequency}: {x.name}" for x in found]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.34 * len(found)), dpi=150)
    for row, one in enumerate(found):
        left, total = 0.0, sum(one.phases.values())
        # The phases are those of other steps: their shares are drawn in the length of the median.
        shares = {p: one.median * one.phases[p] / total for p in PHASES} if total else {}
        for phase, colour in zip(PHASES, _COLOURS, strict=True):
            width = shares.get(phase, one.median if phase == "rest" and not total else 0.0)
            label = phase if row == 0 or (phase == "rest" and row == 0) else None
            axes.barh(row, width, left=left, color=colour, height=0.7, label=label)
            left += width
        axes.text(left, row, f" {one.median:.1f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(one.median for one in found))
    axes.set_xlabel("milliseconds of a step; colours are the shares of its phases")
    axes.legend(
        ncols=len(PHASES), fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0)
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
