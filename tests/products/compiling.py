"""Kernels compiled ahead of time for devices that are not there, and what their machine code uses."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dash_shampoo.products import kernels
from dash_shampoo.products.tiles import Tiles

_DTYPES = {"fp16": "*fp16", "bf16": "*bf16"}


@dataclass(frozen=True)
class _Signature:
    """How a kernel is specialised: as for sizes and strides that 16 divides, and rows without gaps.

    Attributes:
        kernel (Any): The kernel.
        pointers (tuple): To float32.
        halves (tuple): To what the precision has for operands.
        floats (tuple): Numbers.
        longs (tuple): 64-bit integers.
        aligned (tuple): What 16 divides, beside the pointers.
        ones (tuple): Strides of 1.
    """

    kernel: Any
    pointers: tuple[str, ...]
    halves: tuple[str, ...]
    floats: tuple[str, ...]
    longs: tuple[str, ...]
    aligned: tuple[str, ...]
    ones: tuple[str, ...] = ()


SIGNATURES = {
    "square": _Signature(
        kernels.symmetric_square,
        ("out", "S", "addends", "weights", "scale", "factors", "offsets", "norms"),
        (),
        ("alpha", "beta", "shift"),
        ("addend_stride",),
        ("out", "S", "addends", "size", "addend_stride"),
    ),
    "outer": _Signature(
        kernels.accumulate_outer,
        ("factors",),
        ("G",),
        ("decay", "weight"),
        ("factor_stride", "block_stride"),
        ("factors", "G", "size", "num_columns", "num_inner", "factor_stride", "block_stride", "row_stride"),
        ("inner_stride",),
    ),
    "two_sided": _Signature(
        kernels.two_sided,
        ("out", "G"),
        ("X", "Y"),
        (),
        ("block_stride", "x_stride", "y_stride"),
        ("out", "G", "X", "Y", "num_rows", "num_columns", "block_stride", "row_stride", "x_stride", "x_row",
         "y_stride", "y_row"),
        ("column_stride", "x_column", "y_column"),
    ),
}  # fmt: skip


def compile_kernel(
    name: str, device: str, precision: str, tiles: Tiles, **constants: int | bool
) -> Any:
    """A kernel for "sm_90" and its like; `constants` are its further compile-time arguments."""
    signature = SIGNATURES[name]
    names = list(signature.kernel.arg_names)
    values: dict[str, Any] = {"PRECISION": precision, "TILE": tiles.tile, "STEP": tiles.step}
    values |= constants | dict.fromkeys(signature.ones, 1)
    source = ASTSource(
        fn=signature.kernel,
        signature={
            name: "constexpr" if name in values
            else "*fp32" if name in signature.pointers
            else _DTYPES.get(precision, "*fp32") if name in signature.halves
            else "fp32" if name in signature.floats
            else "i64" if name in signature.longs
            else "i32"
            for name in names
        },
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in signature.aligned},
    )  # fmt: skip
    return triton.compile(
        source,
        target=GPUTarget("cuda", int(device.removeprefix("sm_")), 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a thread, as `cuobjdump` reads them from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    run = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return {
        name: int(n)
        for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout + run.stderr)
    }
