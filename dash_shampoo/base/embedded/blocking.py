"""Merging of small dimensions, splitting into blocks, packing of symmetric matrices."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

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
    blocks: Sequence[Tensor] = (tensor,)
    for dim, size in enumerate(tensor.shape):
        if size > split_size:
            # The operator itself: `torch.split` goes through two wrappers in Python.
            blocks = [b for block in blocks for b in block.unsafe_split(int(split_size), dim)]
    return tuple(blocks)


def grid_view(blocks: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
    """One view of blocks that lie in a regular grid in memory.

    Such are the pieces of equal shape of one tensor, and consecutive slots of a stack. Compared are
    addresses, shapes and strides, on the host.

    Args:
        blocks: The blocks, the last dimension of the grid running fastest.
        counts: Number of blocks in every dimension of the grid.

    Returns:
        A view of shape (*counts, *block shape), or None where the blocks do not lie so.

    Raises:
        ValueError: If the counts are not those of the blocks.

    Example:
        >>> blocks = multi_dim_split(torch.arange(24).view(4, 6), 2)
        >>> grid_view(blocks, (2, 3)).shape
        torch.Size([2, 3, 2, 2])
    """
    if not blocks or math.prod(counts) != len(blocks):
        raise ValueError(
            f"Invalid counts={tuple(counts)}: they are not those of {len(blocks)} blocks."
        )
    first = blocks[0]
    shape, strides, dtype = first.shape, first.stride(), first.dtype
    pointers = list(map(Tensor.data_ptr, blocks))
    base, item = pointers[0], first.element_size()
    # Each dimension's stride is read off its second block; then every block must be where they say.
    grid_strides, expected, step = [], [base], len(blocks)
    for count in counts:
        step //= count
        stride = pointers[step] - base if count > 1 else 0
        grid_strides.append(stride)
        expected = [p + index * stride for p in expected for index in range(count)]
    if pointers != expected or base == 0 or any(s < 0 or s % item for s in grid_strides):
        return None
    if any(b.shape != shape or b.stride() != strides or b.dtype != dtype for b in blocks):
        return None
    view_shape = (*counts, *shape)
    view_strides = (*(s // item for s in grid_strides), *strides)
    # Addresses inside of the first block's storage are that storage's.
    span = sum((n - 1) * s for n, s in zip(view_shape, view_strides, strict=True)) + 1
    end = (first.storage_offset() + span) * item
    if first.numel() == 0 or end > first.untyped_storage().nbytes():
        return None
    return first.as_strided(view_shape, view_strides)


def equal_grids(
    shape: Sequence[int], split_size: int | float
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The pieces of `multi_dim_split`, gathered to regular grids of equal pieces.

    Args:
        shape: Shape of the tensor.
        split_size: Largest dimension of a block.

    Yields:
        For each grid the numbers of its blocks, and their counts per dimension.

    Example:
        >>> list(equal_grids((4, 5), 2))
        [((0, 1, 3, 4), (2, 2)), ((2, 5), (2, 1))]
    """
    cuts = [range(0, size, size if math.isinf(split_size) else int(split_size)) for size in shape]
    runs = []
    for size, cut in zip(shape, cuts, strict=True):
        num_whole = size // cut.step
        runs.append([r for r in (range(num_whole), range(num_whole, len(cut))) if r])
    factors = [math.prod(map(len, cuts[k + 1 :])) for k in range(len(cuts))]
    for grid in product(*runs):
        numbers = tuple(
            sum(index * factor for index, factor in zip(position, factors, strict=True))
            for position in product(*grid)
        )
        yield numbers, tuple(map(len, grid))


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
