"""The pictures of the demo: curves of the validation loss, and bars of the time per step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt

# Okabe and Ito's palette, which colour-blind people can tell apart too.
COLOURS = ("#7f7f7f", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Curve:
    """One run, as the plots need it.

    Attributes:
        label: Its name in the legend.
        steps: Steps of the validations.
        seconds: Seconds of training until each of them.
        losses: Validation losses, all finite; fewer than the others' where the run diverged.
        model_ms: Milliseconds per step of forward and backward pass.
        optimizer_ms: Milliseconds per step of the optimizer.
        colour: Its colour in every picture.
        diverged: Whether it ended before its time.
    """

    label: str
    steps: Sequence[int]
    seconds: Sequence[float]
    losses: Sequence[float]
    model_ms: float
    optimizer_ms: float
    colour: str = COLOURS[0]
    diverged: bool = False

    @property
    def learned(self) -> bool:
        """Whether it ended below the loss of the untrained model."""
        return not self.diverged and self.losses[-1] < self.losses[0]


def plot_losses(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Validation loss against steps, and against seconds of training.

    Args:
        curves: The runs.
        path: PNG file to write.
        title: Heading of the picture.
    """
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
        for index, curve in enumerate(curves):
            style = _line_style(curve, covers=_covers_another(curves, index))
            left.plot(curve.steps, curve.losses, label=curve.label, **style)
            right.plot(curve.seconds, curve.losses, **style)
        left.set(xlabel="steps", ylabel="validation loss (nats per token)")
        right.set(xlabel="seconds of training")
        left.set_xlim(left=0)
        right.set_xlim(left=0)
        left.set_ylim(*loss_range(curves))
        figure.suptitle(title, fontsize=11)
        columns = len(curves) if len(curves) <= 4 else (len(curves) + 1) // 2
        figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, frameon=False)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def _line_style(curve: Curve, covers: bool) -> dict[str, Any]:
    return {
        "color": curve.colour,
        "linewidth": 1.6 if covers else 2.6,
        "linestyle": (0, (4, 1.5)) if covers else "-",
        "marker": "o",
        "markersize": 2.5 if covers else 3.5,
    }


def _covers_another(curves: Sequence[Curve], index: int) -> bool:
    """Whether a curve lies on an earlier one: drawn thin and dashed, it lets both be seen."""
    bottom, top = loss_range(curves)
    return any(
        max(abs(a - b) for a, b in zip(curves[index].losses, earlier.losses, strict=False))
        < 0.01 * (top - bottom)
        for earlier in curves[:index]
    )


def loss_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """The part of the vertical axis that is shown.

    The first, steep part is left out where what follows has room for it: it would squeeze the
    differences between the runs into a few pixels. At least three points of each curve are seen,
    and nothing above the loss of the untrained model, unless no run got below it: then everything is.

    Args:
        curves: The runs.

    Returns:
        Lower and upper end.
    """
    if not any(curve.learned for curve in curves):
        losses = [loss for curve in curves for loss in curve.losses]
        margin = 0.06 * max(max(losses) - min(losses), 1e-3)
        return min(losses) - margin, max(losses) + margin
    shown = [loss for curve in curves for loss in curve.losses[min(2, len(curve.losses) // 4) :]]
    untrained = max(curve.losses[0] for curve in curves)
    bottom, top = min(shown), min(max(shown), untrained)
    margin = 0.06 * max(top - bottom, 1e-3)
    return bottom - margin, top + margin


def plot_step_times(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Milliseconds per step, one bar per run: the model's share in grey, the optimizer's coloured.

    Args:
        curves: The runs.
        path: PNG file to write.
        title: Heading of the picture.
    """
    with plt.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(8.5, 0.9 + 0.52 * len(curves)))
        widest = max(curve.model_ms + curve.optimizer_ms for curve in curves)
        for index, curve in enumerate(curves):
            axes.barh(index, curve.model_ms, color="#d9d9d9", height=0.62)
            axes.barh(
                index,
                curve.optimizer_ms,
                left=curve.model_ms,
                color=curve.colour,
                height=0.62,
            )
            axes.text(
                curve.model_ms + curve.optimizer_ms + 0.01 * widest,
                index,
                f"{curve.optimizer_ms:.1f} ms",
                va="center",
            )
        axes.set_yticks(range(len(curves)), [curve.label for curve in curves])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, widest * 1.13)
        axes.set_xlabel(
            "milliseconds per step: forward and backward pass (grey), optimizer (coloured)"
        )
        axes.set_title(title, fontsize=11, loc="left")
        figure.savefig(path)
        plt.close(figure)
