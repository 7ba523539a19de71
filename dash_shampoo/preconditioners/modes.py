"""Products of blocks with matrices in a dimension, unfoldings, and how a piece is cut for caches."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dash_shampoo.products import can_use_two_sided, exact_products, two_sided

# Blocks of a part: with what is made of them they should fit a core's cache.
_PART_BYTES = 2**20


def parts(blocks: Tensor) -> list[slice]:
    """The rows of a piece (K, *shape) in parts, on the CPU such that each stays in a core's cache."""
    count = len(blocks)
    per_row = max(blocks[:1].numel() * blocks.element_size(), 1)
    rows = max(_PART_BYTES // per_row, 1) if blocks.device.type == "cpu" else count
    if rows >= count:
        return [slice(0, count)]
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def by_parts(blocks: Tensor, function: Callable[[Tensor, slice, Tensor], None]) -> Tensor:
    """Applies a function to the `parts` of a piece.

    Args:
        blocks: (K, *shape) of the piece.
        function: Takes some of its blocks, their rows, and a tensor like them that it fills.

    Returns:
        Its results for all blocks, in new memory.
    """
    result = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    for part in parts(blocks):
        function(blocks[part], part, result[part])
    return result


def contract(
    blocks: Tensor,
    matrices: dict[int, Tensor],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """G ×_k X_k over some dimensions k of a piece.

    Every dimension in turn is contracted from the front and appended at the back, so that after the
    last one the order is the original; each contraction is one batched matmul. Small matrices are contracted
    on both sides by one kernel, where `can_use_two_sided` says so.

    Args:
        blocks: G, (K, *shape).
        matrices: For some dimensions k the X_k, (K, d_k, m_k); the result is Σ_i G[…, i, …] X_k[i, j].
        dtype: The products are taken in it.
        out: Contiguous, of the result's shape and any dtype, which the result is written to; not the
            memory of `blocks`. (Default: None)

    Returns:
        `out`, or a contiguous or transposed tensor (K, *shape) with m_k in place of d_k, of `dtype` where
        a matrix was applied; where one kernel does it, of that of the blocks.
    """
    if (
        blocks.ndim == 3
        and len(matrices) == 2
        and can_use_two_sided(blocks, matrices[0], matrices[1])
    ):
        return two_sided(blocks, matrices[0], matrices[1], out)
    result = blocks
    shape = list(blocks.shape)
    last = len(shape) - 2
    numel = math.prod(shape[1:])
    with exact_products(
        blocks.device, numel * min((X.shape[-1] for X in matrices.values()), default=0)
    ):
        for dimension, size in enumerate(blocks.shape[1:]):
            # (K, d_k, rest) → (K, rest, d_k)
            front = result.reshape(shape[0], size, math.prod(result.shape[1:]) // max(size, 1)).mT
            matrix = matrices.get(dimension)
            if matrix is None:
                result = front
            elif dimension == last and out is not None and out.dtype == dtype:
                torch.bmm(front.to(dtype), matrix, out=out.view(*front.shape[:2], matrix.shape[-1]))
                return out
            else:
                result = torch.bmm(front.to(dtype), matrix)
            shape[dimension + 1] = result.shape[-1]
    result = result.reshape(shape)
    return result if out is None else out.copy_(result)


def unfold(blocks: Tensor, dimension: int) -> Tensor:
    """Mode-k unfoldings of blocks (K, *shape), as a view of contiguous ones.

    Args:
        blocks: (K, *shape).
        dimension: k.

    Returns:
        (K, d_k, numel / d_k), or (K, d_k, M₁, M₂) for a dimension in the middle, where no view has the
        columns in one dimension; flattened, these are the columns.

    Examples:
        >>> unfold(torch.zeros(5, 2, 3), 1).shape, unfold(torch.zeros(5, 2, 3, 4), 1).shape
        (torch.Size([5, 3, 2]), torch.Size([5, 3, 2, 4]))
    """
    count, *shape = blocks.shape
    before, after = math.prod(shape[:dimension]), math.prod(shape[dimension + 1 :])
    grid = blocks.reshape(count, before, shape[dimension], after).movedim(1, 2)
    if before == 1:
        return grid[:, :, 0]
    return grid[..., 0] if after == 1 else grid
