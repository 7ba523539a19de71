"""Blocks of equal shape that lie regularly in a parameter or gradient, moved together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor


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
