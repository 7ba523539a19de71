"""U = XᵀGY of small blocks on CUDA by one kernel: an operator of torch, and the predicate that chooses it.

Two products read and write six blocks, one kernel four; with operands of half precision, which are rounded as
they are loaded, it moves 12 bytes an element instead of 24. Those bytes are what takes the time, on an H100
up to N ≈ 900 in TF32 and 1,800 in half precision; but a tile of rows of XᵀG has to stay in the registers of a
program, which the table allows up to N = 256. In exact fp32, without tensor cores, the multiplications take
longer than the bytes from N ≈ 120 on: torch's products serve at every size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dash_shampoo.products.precision import HALVES, is_tf32_allowed
from dash_shampoo.products.tiles import Tiles, can_use_kernel, operator, tiles_for

SIDED_PRECISIONS = ("tf32", "fp16", "bf16")
_PRECISIONS = {torch.float32: "tf32", **HALVES}
_LEAST_WIDTH = 16


def can_use_two_sided(G: Tensor, X: Tensor, Y: Tensor) -> bool:
    """Whether the kernel takes a product; else torch's products do.

    Args:
        G: (K, m, n) blocks.
        X: (K, m, m).
        Y: (K, n, n), of the same dtype: that of the operands.

    Returns:
        True on CUDA where Triton is and the table has tiles for max(m, n), for operands of half precision,
        and for float32 where TF32 is allowed; not inside of a compiled graph.
    """
    return (
        G.is_cuda
        and not torch.compiler.is_compiling()
        and (X.dtype != torch.float32 or is_tf32_allowed())
        and X.dtype == Y.dtype
        and X.dtype in _PRECISIONS
        and G.dtype in _PRECISIONS
        and X.shape[1:] == (G.shape[1], G.shape[1])
        and Y.shape[1:] == (G.shape[2], G.shape[2])
        and G.numel() > 0
        and can_use_kernel("two_sided", G, _PRECISIONS[X.dtype], max(G.shape[1:]))
    )


def two_sided(G: Tensor, X: Tensor, Y: Tensor, out: Tensor | None = None) -> Tensor:
    """XᵀGY of each block, in one launch.

    Args:
        G: (K, m, n) blocks of any strides; float32, bfloat16 or float16.
        X: (K, m, m) of any strides. Its dtype is that of the operands, to which G and XᵀG are rounded, about
            4e-4 of the result in TF32, 3e-4 in float16 and 2e-3 in bfloat16; float32 stands for TF32. Sums
            are float32.
        Y: (K, n, n) of any strides, of the dtype of X.
        out: (K, m, n), contiguous, which is written to; no memory of the others. (Default: of the dtype of G)

    Returns:
        (K, m, n), contiguous.
    """
    if out is None:
        out = torch.empty_like(G, memory_format=torch.contiguous_format)
    _two_sided_(out, G, X, Y, _PRECISIONS[X.dtype])
    return out


def launch_two_sided(
    kernel: Any, tiles: Tiles, out: Tensor, G: Tensor, X: Tensor, Y: Tensor, precision: str
) -> None:
    """Launch the kernel with given tiles: what the operator does, and what tests and `tools/tune.py` do.

    Args:
        kernel: `kernels.two_sided`.
        tiles: How it cuts: `tile` rows of the result, `step` columns of what is multiplied at a time.
        out: (K, m, n), contiguous; must overlap none of the others.
        G: As of `two_sided`, and so are the others.
        X: See there.
        Y: See there.
        precision: One of `SIDED_PRECISIONS`.
    """
    num_blocks, num_rows, num_columns = G.shape
    num_tiles = -(-num_rows // tiles.tile)
    kernel[(num_blocks * num_tiles,)](
        out,
        G,
        X,
        Y,
        num_rows,
        num_columns,
        num_tiles,
        *G.stride(),
        *X.stride(),
        *Y.stride(),
        WIDTH=max(_LEAST_WIDTH, 1 << (num_columns - 1).bit_length()),
        **tiles.options(precision),
    )


def _on_cuda(out: Tensor, G: Tensor, X: Tensor, Y: Tensor, precision: str) -> None:
    from dash_shampoo.products import kernels  # Triton is imported by the first launch

    tiles = tiles_for("two_sided", G, precision, max(G.shape[1:]))
    launch_two_sided(kernels.two_sided, tiles, out, G, X, Y, precision)


def _on_cpu(out: Tensor, G: Tensor, X: Tensor, Y: Tensor, precision: str) -> None:
    del precision
    out.copy_(torch.bmm(torch.bmm(X.mT, G.to(X.dtype)), Y))


_two_sided_ = operator(
    "two_sided_(Tensor(a!) out, Tensor G, Tensor X, Tensor Y, str precision) -> ()",
    _on_cuda,
    _on_cpu,
)
