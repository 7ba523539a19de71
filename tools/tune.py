"""Measures on the CUDA device that is there, and writes what is fastest into the library's tables.

    python tools/tune.py
    python tools/tune.py --dry

`dash_shampoo/products/tiles.json`: the tiles of each kernel, precision and size, or torch's products.
`dash_shampoo/inverse_root/eigh_devices.json`: which eigendecompositions are faster on the CPU.
Nothing is tuned while training.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.gpu_kernels import (
    DECAY,
    DTYPES,
    LARGEST_SIDE,
    WEIGHT,
    queued_milliseconds,
    torch_sides,
    torch_update,
)
from dash_shampoo.base import pack
from dash_shampoo.inverse_root import eigh_device
from dash_shampoo.products import Products, fused, outer, sides
from dash_shampoo.products.precision import tf32_switch
from dash_shampoo.products.tiles import TABLE, Tiles

SIZES = (32, 64, 128, 256, 512, 1024, 2048)
# About as many bytes for every size, but at least some blocks.
ELEMENTS = 2**24
EIGH_SIZES, EIGH_NUMBERS = (16, 32, 64, 128, 256, 512, 1024), (1, 4, 16, 64, 256)
CANDIDATES = [
    Tiles(0, tile, step, num_warps, num_stages)
    for tile, step, num_warps, num_stages in [
        *itertools.product((32,), (32,), (2, 4), (2, 3)),
        *itertools.product((64,), (16, 32, 64), (4,), (2, 3, 4)),
        *itertools.product((128,), (8, 16, 32), (8,), (2, 3, 4)),
    ]
]
SIDED_CANDIDATES = [
    Tiles(0, *choice) for choice in itertools.product((32, 64), (16, 32), (4, 8), (2, 3))
]
TORCH = Tiles(0, 0, 0, 0, 0)


def milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a call on the device."""
    call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def fastest(
    launch: Callable[[Tiles], object],
    reference: Callable[[], object],
    name: str,
    candidates: Sequence[Tiles] = CANDIDATES,
) -> Tiles:
    """The candidate that takes the device the least time; `TORCH` where torch's products take less."""

    def time_of(call: Callable[[], object]) -> float:
        call()
        return statistics.median(queued_milliseconds(call) for _ in range(5))

    times = {TORCH: time_of(reference)}
    for tiles in candidates:
        try:
            times[tiles] = time_of(partial(launch, tiles))
        except Exception as error:  # more shared memory than there is
            print(f"{name} {tiles}: {type(error).__name__}")
    return min(times, key=lambda tiles: times[tiles])


def stack(size: int) -> torch.Tensor:
    """Identities, so that no result grows."""
    return torch.eye(size, device="cuda").expand(max(1, ELEMENTS // size**2), -1, -1).contiguous()


def square_tiles(precision: Any, size: int) -> Tiles:
    """The tiles that square a stack of a size in the least time."""
    from dash_shampoo.products import kernels

    S = stack(size)
    out, M = torch.zeros_like(S), S.clone()

    def launch(tiles: Tiles) -> None:
        operands = (out, S, M, None, None, precision, 0.5, 0.5, 0.1)
        fused.launch_square(kernels.symmetric_square, tiles, *operands)

    def reference() -> None:
        Products(precision)._reference_square(S, out, 0.5, M, 0.5, 0.1, None)

    return fastest(launch, reference, f"square {precision} {size}")


def outer_tiles(precision: str, size: int, *, is_packed: bool) -> Tiles:
    """The tiles that update factor matrices of a size by square blocks in the least time."""
    from dash_shampoo.products import kernels

    factors = pack(stack(size)) if is_packed else stack(size)
    gradients = stack(size).to(DTYPES.get(precision, torch.float32))

    def launch(tiles: Tiles) -> None:
        operands = (factors, gradients, DECAY, WEIGHT, precision)
        outer.launch_outer(kernels.accumulate_outer, tiles, *operands)

    with tf32_switch(precision == "tf32"):
        reference = partial(torch_update, factors, gradients)
        return fastest(launch, reference, f"update {precision} {size}")


def sided_tiles(precision: str, size: int) -> Tiles:
    """The tiles that multiply square blocks on both sides in the least time; torch's products beyond 256."""
    from dash_shampoo.products import kernels

    if size > LARGEST_SIDE:
        return TORCH
    G = stack(size)
    X, out = G.to(DTYPES.get(precision, torch.float32)), torch.empty_like(G)

    def launch(tiles: Tiles) -> None:
        sides.launch_two_sided(kernels.two_sided, tiles, out, G, X, X, precision)

    with tf32_switch(precision == "tf32"):
        reference = partial(torch_sides, G, X, X)
        return fastest(launch, reference, f"sides {precision} {size}", SIDED_CANDIDATES)


KERNELS: dict[str, tuple[Callable[..., Tiles], tuple[str, ...]]] = {
    "square": (square_tiles, fused.FUSED_PRECISIONS),
    "outer": (partial(outer_tiles, is_packed=False), outer.OUTER_PRECISIONS),
    "outer_small": (partial(outer_tiles, is_packed=True), outer.OUTER_PRECISIONS),
    "two_sided": (sided_tiles, sides.SIDED_PRECISIONS),
}


def merged(rows: Sequence[tuple[int, tuple[Any, ...]]]) -> list[list[Any]]:
    """Rows [max_size, …] of the best by size; neighbours that are equal are one, the last is for any size."""
    result: list[list[Any]] = []
    for size, best in rows:
        if result and tuple(result[-1][1:]) == best:
            result[-1][0] = size
        else:
            result.append([size, *best])
    result[-1][0] = 0
    return result


Rows = dict[str, list[list[Any]]]


def tune_kernels() -> dict[str, Rows]:
    """The tiles of every kernel and precision on this device."""
    table: dict[str, Rows] = {}
    for kernel, (tiles_of, precisions) in KERNELS.items():
        table[kernel] = {}
        for precision in precisions:
            best = [(size, tiles_of(precision, size)) for size in SIZES]
            table[kernel][precision] = merged(
                [(size, dataclasses.astuple(tiles)[1:]) for size, tiles in best]
            )
            torch.cuda.empty_cache()
    return table


def write_tiles(path: Path, of_device: dict[str, Rows], device: str, name: str) -> None:
    """Puts the rows of a device into the table of tiles, with where they come from."""
    table = json.loads(path.read_text())
    for kernel, rows in of_device.items():
        table[kernel][device] = rows
    table["provenance"][device] = provenance(name)
    parts = [f'  "columns": {json.dumps(table["columns"])}']
    lines = [f'    "{key}": {json.dumps(text)}' for key, text in table["provenance"].items()]
    parts.append('  "provenance": {\n' + ",\n".join(lines) + "\n  }")
    for kernel in KERNELS:
        devices = [
            f'    "{key}": {{\n'
            + ",\n".join(f'      "{p}": {json.dumps(tiles)}' for p, tiles in rows.items())
            + "\n    }"
            for key, rows in table[kernel].items()
        ]
        parts.append(f'  "{kernel}": {{\n' + ",\n".join(devices) + "\n  }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def tune_eigh() -> list[list[int]]:
    """Rows [largest size, fewest matrices] from which on the CPU decomposes faster, copies included."""
    wins: dict[int, int] = {}
    for size, num_blocks in itertools.product(EIGH_SIZES, EIGH_NUMBERS):
        A = torch.randn(num_blocks, size, size, device="cuda")
        A = A @ A.mT

        def on_the_cpu(A: torch.Tensor = A) -> None:
            for part in torch.linalg.eigh(A.cpu()):
                part.to("cuda")

        def on_the_device(A: torch.Tensor = A) -> None:
            torch.linalg.eigh(A)

        if milliseconds(on_the_cpu, 3) < 0.9 * milliseconds(on_the_device, 3):
            wins.setdefault(size, num_blocks)
    return rows_of_wins(wins)


def rows_of_wins(wins: dict[int, int]) -> list[list[int]]:
    """Rows of sizes 0 … N that the CPU wins without a gap, from the most matrices of any of them on."""
    rows: list[list[int]] = []
    for size in EIGH_SIZES:
        if size not in wins:
            break
        fewest = max(wins[size], rows[-1][1] if rows else 0)
        if rows and rows[-1][1] == fewest:
            rows[-1][0] = size
        else:
            rows.append([size, fewest])
    return rows


def write_eigh(path: Path, rows: list[list[int]], device: str, name: str) -> None:
    """Puts the rows of a device into the table of eigendecompositions, with where they come from."""
    table = json.loads(path.read_text())
    table["on_the_cpu"][device] = rows
    table["provenance"][device] = provenance(name)
    path.write_text(json.dumps(table, indent=2) + "\n")


def provenance(name: str) -> str:
    """Who measured."""
    return f"Measured on {name}, torch {torch.__version__}, {datetime.date.today()}."


def main(words: Sequence[str]) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and nothing can be measured.")
    device = "sm_{}{}".format(*torch.cuda.get_device_capability())
    tiles = tune_kernels()
    rows = tune_eigh()
    print(json.dumps({"tiles": tiles, "eigh": rows}, indent=1))
    if not options.dry:
        write_eigh(eigh_device.TABLE, rows, device, torch.cuda.get_device_name())
        write_tiles(TABLE, tiles, device, torch.cuda.get_device_name())


if __name__ == "__main__":
    main(sys.argv[1:])
