"""Merging of small dimensions, splitting into blocks, packing of symmetric matrices."""

import math
from functools import cache, reduce

import torch
from torch import Tensor


@cache
def merge_small_dims(
    shape: tuple[int, ...], threshold: int | float, target_dimensionality: int | float
) -> tuple[int, ...]:
    """Merges adjacent dimensions, from the last on, while their product stays within the threshold.

    Args:
        shape: Shape of the tensor.
        threshold: Largest merged dimension.
        target_dimensionality: Merging stops at this many dimensions; math.inf merges nothing.

    Returns:
        The merged shape, without ones (but for (1,)), and (0,) for an empty tensor.

    Example:
        >>> merge_small_dims((32, 3, 64, 64), 8192, 1)
        (96, 4096)
    """
    if 0 in shape:
        return (0,)
    if target_dimensionality == math.inf:
        return shape
    dims = [size for size in reversed(shape) if size != 1] or [1]
    merged = dims[:1]
    for position, size in enumerate(dims[1:], start=1):
        num_dims_if_kept = len(merged) + len(dims) - position
        if num_dims_if_kept > target_dimensionality and merged[-1] * size <= threshold:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(reversed(merged))


def multi_dim_split(tensor: Tensor, split_size: int | float) -> tuple[Tensor, ...]:
    """Splits every dimension into pieces of `split_size` (the last one may be smaller).

    Args:
        tensor: Tensor of any order.
        split_size: Largest dimension of a block; math.inf keeps the tensor whole.

    Returns:
        Views of the tensor, the last dimension running fastest.
    """
    if all(size <= split_size for size in tensor.shape):
        return (tensor,)
    return reduce(
        lambda blocks, dim: tuple(
            piece for block in blocks for piece in torch.split(block, int(split_size), dim=dim)
        ),
        range(tensor.dim()),
        (tensor,),
    )


@cache
def _upper_triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, device=device).to(torch.int32).unbind()
    return rows, columns


def pack_upper_triangular(matrix: Tensor) -> Tensor:
    """The upper triangle of an (N, N) matrix row by row, as (N(N+1)/2,)."""
    rows, columns = _upper_triangle(matrix.shape[0], matrix.device)
    return matrix[rows, columns]


def unpack_upper_triangular(packed: Tensor) -> Tensor:
    """The symmetric (N, N) matrix of a packed upper triangle (N(N+1)/2,)."""
    size = (math.isqrt(1 + 8 * packed.numel()) - 1) // 2
    rows, columns = _upper_triangle(size, packed.device)
    matrix = packed.new_empty(size, size)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix
