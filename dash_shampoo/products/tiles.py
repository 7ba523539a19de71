"""What our kernels share: how they cut their matrices, by a committed table, and where they can run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tiles.json")
"""Tiles by kernel, device and precision; `tools/tune.py` measures and writes it."""

# Tensor cores for TF32 and bf16 came with it.
_LEAST_CAPABILITY = (8, 0)
# Places in a matrix are counted in 32 bits.
_MAX_SIZE = 46340

_are_assumed = ContextVar("_are_assumed", default=False)

_library = torch.library.Library("dash_shampoo", "DEF")  # type: ignore[no-untyped-call]


def operator(
    schema: str, on_cuda: Callable[..., None], on_cpu: Callable[..., None]
) -> Callable[..., None]:
    """Define an operator of torch that is one launch.

    Being an operator, it is seen by dispatch modes (counting, fake tensors).

    Args:
        schema: Its name, arguments and what it writes to.
        on_cuda: Launches the kernel, on the current device, which is made that of the first argument.
        on_cpu: The reference, for those who count.

    Returns:
        The operator.
    """

    def launch(out: Tensor, *arguments: Any) -> None:
        with torch.cuda.device(out.device):
            on_cuda(out, *arguments)

    name = _library.define(schema)  # type: ignore[no-untyped-call]
    for key, function in (("CUDA", launch), ("CPU", on_cpu), ("Meta", lambda *arguments: None)):
        _library.impl(name, function, key)  # type: ignore[no-untyped-call]
    found: Callable[..., None] = getattr(torch.ops.dash_shampoo, name)
    return found


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its matrices.

    Attributes:
        max_size (int): The largest N that it is for; 0 for any.
        tile (int): Rows and columns of a tile of the result; 0 where torch's products serve.
        step (int): Columns of the operands that are multiplied at a time.
        num_warps (int): Warps of a program.
        num_stages (int): Steps that are in flight.
    """

    max_size: int
    tile: int
    step: int
    num_warps: int
    num_stages: int

    def options(self, precision: str) -> dict[str, Any]:
        """What every kernel is compiled for."""
        return {
            "PRECISION": precision,
            "TILE": self.tile,
            "STEP": self.step,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def num_of_triangle(self, size: int) -> int:
        """How many tiles the lower triangle of N×N has."""
        num_rows = -(-size // self.tile)
        return num_rows * (num_rows + 1) // 2


@lru_cache(maxsize=8)
def tile_table(kernel: str) -> dict[str, dict[str, list[Tiles]]]:
    """The committed table of a kernel: tiles by "sm_90" and precision, ordered by size."""
    rows = json.loads(TABLE.read_text())[kernel]
    return {
        device: {name: [Tiles(*row) for row in tiles] for name, tiles in of_device.items()}
        for device, of_device in rows.items()
    }


@lru_cache(maxsize=1024)
def find_tiles(kernel: str, capability: tuple[int, int], precision: str, size: int) -> Tiles:
    """The tiles of the newest device of this generation in the table, else those of sm_80.

    Shared memory is what sets a limit to tiles, and another generation may have less.

    Args:
        kernel: Of the table: "square", "outer", "outer_small" or "two_sided".
        capability: Compute capability, at least 8.0.
        precision: Of the operands.
        size: N.

    Returns:
        The tiles.

    Examples:
        >>> find_tiles("square", (8, 6), "fp16", 32) == find_tiles("square", (8, 0), "fp16", 32)
        True
    """
    major, minor = capability
    table = tile_table(kernel)
    names = [f"sm_{major}{number}" for number in range(minor, -1, -1)]
    device = next((name for name in names if name in table), "sm_80")
    rows = table[device][precision]
    return next(tiles for tiles in rows if tiles.max_size == 0 or size <= tiles.max_size)


def can_use_kernel(kernel: str, A: Tensor, precision: str, size: int) -> bool:
    """Whether a kernel serves: on CUDA from compute capability 8.0, where Triton is, and the table has tiles.

    Args:
        kernel: As of `find_tiles`.
        A: A tensor on the device.
        precision: Of the operands.
        size: N.

    Returns:
        False where torch's products serve.
    """
    if _are_assumed.get():
        return True
    if not A.is_cuda or size > _MAX_SIZE or not _has_triton():
        return False
    capability = torch.cuda.get_device_capability(A.device)
    return (
        capability >= _LEAST_CAPABILITY and find_tiles(kernel, capability, precision, size).tile > 0
    )


@contextmanager
def assumed_kernels() -> Iterator[None]:
    """Kernels serve everywhere, by their references: to count what a device that has them would do."""
    token = _are_assumed.set(True)
    try:
        yield
    finally:
        _are_assumed.reset(token)


def are_kernels_assumed() -> bool:
    """Whether `assumed_kernels` holds: what is counted is a device, wherever it runs."""
    return _are_assumed.get()


def tiles_for(kernel: str, A: Tensor, precision: str, size: int) -> Tiles:
    """`find_tiles` for the device of a tensor."""
    return find_tiles(kernel, torch.cuda.get_device_capability(A.device), precision, size)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None
