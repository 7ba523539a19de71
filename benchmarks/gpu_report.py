"""The report of `gpu.py`: its head, its parts, which may fail, and its plot."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dash_shampoo as ds
from benchmarks.gpu_bars import bar_table
from benchmarks.gpu_kernels import Row, brief, release
from dash_shampoo.planning.devices import DEVICES, Device, precision_of
from dash_shampoo.products.fused import FUSED_PRECISIONS


def device_of(hardware: str) -> Device | None:
    """The device whose peak rates are known, by the name that torch gives it."""
    return next((device for name, device in DEVICES.items() if name in hardware), None)


def peak_rates(hardware: str) -> dict[str, float]:
    """Its peak rates by precision; empty where the device is unknown."""
    device = device_of(hardware)
    if device is None:
        return {}
    return dict(device.peak_flops) | {"fp32": device.peak_flops[precision_of(torch.float32)]}


class Report:
    """The text of the report, written anew after every part: what fails later loses nothing.

    Args:
        options: Of the command.
        head: What stands above the bars.
    """

    def __init__(self, options: argparse.Namespace, head: str) -> None:
        self.rows: list[Row] = []
        self.shares: dict[str, float] = {}
        self.measured: dict[str, list[Any]] = {}
        self._path, self._head, self._parts = options.output, head, [""]
        self._begin = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """A part, which ends with its failure if it fails."""
        self.add(title)
        try:
            yield
        except Exception as error:
            logging.getLogger(__name__).exception("%s failed.", title)
            self.add(f"Failed: {brief(error)}.\n")
            release()

    def add(self, text: str) -> None:
        """Adds a paragraph or a table, and writes."""
        self._parts.append(text)
        print(text, flush=True)
        self.write()

    def write(self) -> str:
        """Writes all that is known so far, and returns it."""
        elapsed = f"- Took {time.monotonic() - self._begin:.0f} s."
        bars = bar_table(self.rows, self.shares, self.measured)
        plot = f"![Squares and steps]({self._path.with_suffix('.png').name})"
        text = "\n".join([self._head, elapsed, "", bars, plot, *self._parts])
        self._path.write_text(text)
        return text


def head_of(options: argparse.Namespace) -> str:
    """What was measured, where, and by what."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "missing: no kernels"
    device = device_of(options.hardware)
    peaks = "unknown" if device is None else f"{device.description}, dense"
    lines = [
        f"# {options.hardware}",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Command: `python benchmarks/gpu.py {' '.join(options.words)}`".replace("py `", "py`"),
        f"- Versions: dash_shampoo {ds.__version__}, base {ds.base.name}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, Triton {triton}",
        f"- float32 products outside of the solvers: `{torch.get_float32_matmul_precision()}`. Muon takes "
        "all matrices, embeddings included, and multiplies in bf16. A rate counts a symmetric square as a "
        f"whole product, of which a kernel multiplies one triangle; peak rates: {peaks}.",
    ]
    return "\n".join(lines)


def draw(rows: Sequence[Row], measured: dict[str, list[Any]], path: Path) -> None:
    """Speed of the squares over fp32, and milliseconds of a step with a refresh."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("No plot: matplotlib is not importable here.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for precision in FUSED_PRECISIONS:
        timed = [r for r in rows if r["precision"] == precision and "fp32" in r]
        left.plot(
            [r["N"] for r in timed], [r["fp32"] / r["ours"] for r in timed], "o-", label=precision
        )
    left.set(
        xscale="log", xlabel="N", ylabel="times as fast as bmm in fp32", title="Square of a stack"
    )
    left.axhline(1.0, color="0.7", zorder=0)
    left.legend()
    bars = [
        (f"{case}: {v.name}", statistics.median(v.times[1]))
        for case, variants in measured.items()
        for v in variants
    ]
    right.barh([name for name, _ in bars], [value for _, value in bars])
    right.set(xscale="log", xlabel="ms", title="Step, refresh every 1")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
