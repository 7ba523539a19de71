"""F ← βF + w·GGᵀ on CUDA by one kernel: an operator of torch, and the predicate that chooses it.

It multiplies one triangle, writes both or the packed one, and reads gradients where they lie: in their own
dtype, whose halves it multiplies on tensor cores without an error, and in any dimension of their blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dash_shampoo.products.precision import HALVES, is_tf32_allowed
from dash_shampoo.products.tiles import Tiles, can_use_kernel, operator, tiles_for

OUTER_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
# A program adds up all columns; cuBLAS can split longer sums among several.
_MOST_COLUMNS_PER_ROW = 64
_MOST_PLACES = 2**31


def outer_precision(unfolded: Tensor) -> str:
    """How the outer products of gradients are taken: exactly, or in TF32 where the program allows it."""
    return HALVES.get(unfolded.dtype) or ("tf32" if is_tf32_allowed() else "fp32")


def _rows_of(factors: Tensor, unfolded: Tensor) -> str:
    """The name in the table: packed triangles and middle dimensions take registers, and save more."""
    return "outer_small" if factors.ndim == 2 or unfolded.ndim == 4 else "outer"


def can_use_outer(factors: Tensor, unfolded: Tensor) -> bool:
    """Whether the kernel takes an update; else torch's products do.

    Args:
        factors: (B, N, N), or packed (B, P).
        unfolded: (B, N, M), or (B, N, M₁, M₂) where no view has the columns in one dimension.

    Returns:
        True for float32 factor matrices on CUDA, where Triton is and the table has tiles, and for sums that
        one program can add up.
    """
    size, num_columns = unfolded.shape[1], unfolded.shape[2:].numel()
    return (
        factors.is_cuda
        and factors.numel() > 0
        and factors.dtype == torch.float32
        and factors[0].is_contiguous()
        and (unfolded.dtype == torch.float32 or unfolded.dtype in HALVES)
        and 0 < num_columns <= _MOST_COLUMNS_PER_ROW * size
        and sum(
            n * stride for n, stride in zip(unfolded.shape[1:], unfolded.stride()[1:], strict=True)
        )
        < _MOST_PLACES
        and can_use_kernel(_rows_of(factors, unfolded), factors, outer_precision(unfolded), size)
    )


def accumulate_outer_(factors: Tensor, unfolded: Tensor, decay: float, weight: float) -> None:
    """F ← decay·F + weight·UUᵀ, in one launch.

    Args:
        factors: (B, N, N), symmetric, exactly so afterwards; or the packed upper triangles (B, P). float32.
        unfolded: U, (B, N, M) or (B, N, M₁, M₂), of any strides; float32, bfloat16 or float16.
        decay: Factor of the old values.
        weight: Factor of the products.
    """
    _accumulate_outer_(factors, unfolded, decay, weight, outer_precision(unfolded))


def launch_outer(
    kernel: Any,
    tiles: Tiles,
    factors: Tensor,
    unfolded: Tensor,
    decay: float,
    weight: float,
    precision: str,
) -> None:
    """Launch the kernel with given tiles: what the operator does, and what tests and `tools/tune.py` do.

    Args:
        kernel: `kernels.accumulate_outer`.
        tiles: How it cuts.
        factors: As of `accumulate_outer_`, and so are the others.
        unfolded: See there.
        decay: See there.
        weight: See there.
        precision: One of `OUTER_PRECISIONS`.
    """
    num_blocks, size, *columns = unfolded.shape
    num_tiles = tiles.num_of_triangle(size)
    block_stride, row_stride, *column_strides = unfolded.stride()
    kernel[(num_blocks * num_tiles,)](
        factors,
        unfolded,
        size,
        unfolded.shape[2:].numel(),
        columns[-1],
        num_tiles,
        factors.stride(0),
        block_stride,
        row_stride,
        column_strides[0],
        column_strides[-1],
        decay,
        weight,
        IS_PACKED=factors.ndim == 2,
        IS_NESTED=len(columns) == 2,
        **tiles.options(precision),
    )


def _on_cuda(
    factors: Tensor, unfolded: Tensor, decay: float, weight: float, precision: str
) -> None:
    from dash_shampoo.products import kernels  # Triton is imported by the first launch

    tiles = tiles_for(_rows_of(factors, unfolded), factors, precision, unfolded.shape[1])
    launch_outer(kernels.accumulate_outer, tiles, factors, unfolded, decay, weight, precision)


def _on_cpu(factors: Tensor, unfolded: Tensor, decay: float, weight: float, precision: str) -> None:
    del precision
    U = unfolded.to(factors.dtype).flatten(2)
    products = torch.bmm(U, U.mT)
    if factors.ndim == 2:
        products = products[:, *torch.triu_indices(U.shape[1], U.shape[1], device=U.device)]
    factors.mul_(decay).add_(products, alpha=weight)


_accumulate_outer_ = operator(
    "accumulate_outer_(Tensor(a!) factors, Tensor unfolded, float decay, float weight, str precision) -> ()",
    _on_cuda,
    _on_cpu,
)
