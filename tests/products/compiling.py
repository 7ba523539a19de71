"""Kernels compiled ahead of time for devices that are not there, and what their machine code uses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dash_shampoo.products import kernels
from dash_shampoo.products.fused import Tiles

_POINTERS = ("out", "S", "addends", "weights", "scale", "factors")
_FLOATS = ("alpha", "beta", "shift", "offset")
_ALIGNED = ("out", "S", "addends", "size", "addend_stride")


def compile_square(device: str, precision: str, tiles: Tiles) -> Any:
    """`symmetric_square` for "sm_90" and its like, specialised as for an N that 16 divides."""
    kernel = kernels.symmetric_square
    constants = {"PRECISION": precision, "TILE": tiles.tile, "STEP": tiles.step}
    names = list(kernel.arg_names)
    signature = {
        name: "constexpr" if name in constants
        else "*fp32" if name in _POINTERS
        else "fp32" if name in _FLOATS
        else "i64" if name == "addend_stride"
        else "i32"
        for name in names
    }  # fmt: skip
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in _ALIGNED},
    )
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
