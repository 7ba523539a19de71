"""What machine and versions a run had, and tables in markdown."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dash_shampoo
from experiments.parallel import Process


def environment(process: Process) -> dict[str, Any]:
    """Versions and hardware, for the first record of a metrics file.

    Args:
        process: One process of the run.

    Returns:
        Plain values.
    """
    on_cuda = process.device.type == "cuda"
    return {
        "dash_shampoo": getattr(dash_shampoo, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(process.device) if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "world_size": process.world_size,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column flush left and the others flush right.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as titles.

    Returns:
        Lines of markdown, padded so that they read well as plain text too.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)]) + "\n"
