"""Products of blocks with matrices in one of their dimensions, and unfoldings, all blocks at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dash_shampoo.products import exact_products


def contract(blocks: Tensor, matrices: dict[int, Tensor], dtype: torch.dtype) -> Tensor:
    """G ×_k X_k over some dimensions k of a piece.

    Every dimension in turn is contracted from the front and appended at the back, so that after the
    last one the order is the original; each contraction is one batched matmul.

    Args:
        blocks: G, (K, *shape).
        matrices: For some dimensions k the X_k, (K, d_k, m_k); the result is Σ_i G[…, i, …] X_k[i, j].
        dtype: The products are taken in it.

    Returns:
        A contiguous or transposed tensor (K, *shape) with m_k in place of d_k, of `dtype` where a
        matrix was applied.
    """
    result = blocks
    shape = list(blocks.shape)
    numel = math.prod(shape[1:])
    with exact_products(
        blocks.device, numel * min((X.shape[-1] for X in matrices.values()), default=0)
    ):
        for dimension, size in enumerate(blocks.shape[1:]):
            # (K, d_k, rest) → (K, rest, d_k)
            front = result.reshape(shape[0], size, math.prod(result.shape[1:]) // max(size, 1)).mT
            matrix = matrices.get(dimension)
            result = front if matrix is None else torch.bmm(front.to(dtype), matrix)
            shape[dimension + 1] = result.shape[-1]
    return result.reshape(shape)


def unfold(blocks: Tensor, dimension: int) -> Tensor:
    """Mode-k unfoldings (K, d_k, numel / d_k) of blocks (K, *shape)."""
    count, *shape = blocks.shape
    size = shape[dimension]
    rest = math.prod(shape) // size if size else 0
    return blocks.movedim(dimension + 1, 1).reshape(count, size, rest)
