"""Merging of small dimensions, splitting into blocks, and grids of blocks that are moved together."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from operator import mul
from typing import Any

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

    Examples:
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


@dataclass(frozen=True)
class Grid:
    """Blocks of equal shape that lie regularly in a tensor.

    Attributes:
        numbers: Their numbers among the blocks of the tensor, ascending.
        counts: How many there are along each dimension; () for a single one.
        starts: Where the first of them begins; () in a tensor that is one block.
        block_shape: Their shape.
    """

    numbers: tuple[int, ...]
    counts: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    block_shape: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The blocks as one view (*counts, *block_shape) of the tensor, of any strides."""
        if not self.starts:
            return tensor
        strides = tensor.stride()
        offset = sum(map(mul, self.starts, strides), tensor.storage_offset())
        if self.counts:
            strides = (*map(mul, self.block_shape, strides), *strides)
        return tensor.as_strided((*self.counts, *self.block_shape), strides, offset)


def equal_grids(shape: Sequence[int], split_size: int | float) -> Iterator[Grid]:
    """The pieces of `multi_dim_split`, gathered to regular grids of equal pieces.

    Args:
        shape: Shape of the tensor.
        split_size: Largest dimension of a block.

    Examples:
        >>> [(grid.numbers, grid.counts) for grid in equal_grids((4, 5), 2)]
        [((0, 1, 3, 4), (2, 2)), ((2, 5), (2, 1))]
    """
    if all(size <= split_size for size in shape):
        yield Grid(numbers=(0,))
        return
    step = int(split_size)
    # Along each dimension the whole pieces, and the rest: their numbers, where they begin, their size.
    runs = []
    for size in shape:
        whole, rest = divmod(size, step)
        run_of_rest = (range(whole, whole + 1), whole * step, rest)
        runs.append([(range(whole), 0, step)] * (whole > 0) + [run_of_rest] * (rest > 0))
    num_pieces = [-(-size // step) for size in shape]
    factors = [math.prod(num_pieces[k + 1 :]) for k in range(len(shape))]
    for grid in product(*runs):
        indices, starts, sizes = zip(*grid, strict=True)
        counts = tuple(map(len, indices))
        yield Grid(
            numbers=tuple(sum(map(mul, position, factors)) for position in product(*indices)),
            counts=counts if math.prod(counts) > 1 else (),
            starts=starts,
            block_shape=sizes,
        )


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """A grid of blocks of this process.

    Attributes:
        positions: Their places among all blocks that have a gradient, ascending.
        counts: How many there are along each dimension; () for one block.
        target: The blocks of the parameter, (*counts, *block shape).
    """

    positions: tuple[int, ...]
    counts: tuple[int, ...]
    target: Tensor


class GridBlocks(Sequence[Tensor]):
    """Blocks that lie in grids, which are cut once somebody asks for a block.

    Args:
        grids: Which blocks there are.
        tensors: For each grid the blocks, (*counts, *block shape).
    """

    def __init__(self, grids: Sequence[BlockGrid], tensors: Sequence[Tensor]) -> None:
        self.grids = grids
        self.tensors = tuple(tensors)

    @cached_property
    def _blocks(self) -> tuple[Tensor, ...]:
        blocks: dict[int, Tensor] = {}
        for grid, tensor in zip(self.grids, self.tensors, strict=True):
            cut = [tensor]
            for _ in grid.counts:
                cut = [part for row in cut for part in row.unbind()]
            blocks.update(zip(grid.positions, cut, strict=True))
        return tuple(blocks[position] for position in range(len(blocks)))

    def __len__(self) -> int:
        return sum(len(grid.positions) for grid in self.grids)

    def __getitem__(self, index: Any) -> Any:
        return self._blocks[index]
