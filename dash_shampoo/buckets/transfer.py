"""Blocks into bucket tensors and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dash_shampoo.base import BlockGrid
from dash_shampoo.buckets.layout import Piece


def gather(blocks: Sequence[Tensor], piece: Piece, out: Tensor | None = None) -> Tensor:
    """The blocks of a piece in one contiguous tensor.

    Args:
        blocks: The active blocks, in any memory layout.
        piece: Which of them.
        out: Where to, (K, *shape). Default: a new tensor.

    Returns:
        (K, *shape).
    """
    return torch.stack([blocks[position] for position in piece.positions], out=out)


def to_blocks(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
    """The blocks of bucket tensors, as views, in the order of the active blocks.

    Args:
        tensors: (K, *shape) of each piece.
        pieces: The pieces, which cover all active blocks.

    Returns:
        One view per active block.
    """
    blocks: dict[int, Tensor] = {}
    for tensor, piece in zip(tensors, pieces, strict=True):
        blocks.update(zip(piece.positions, tensor.unbind(), strict=True))
    return tuple(blocks[position] for position in range(len(blocks)))


@dataclass(frozen=True)
class GridsOfPiece:
    """The grids of blocks that fill a piece.

    A grid is moved by one strided copy, whatever the number of its blocks.

    Attributes:
        numbers: Their numbers among all grids, in the order of their slots.
        sizes: How many blocks each has.
        shapes: Of each (*counts, *block shape).
        block_shape: Shape of a block.
    """

    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    block_shape: tuple[int, ...]

    @cached_property
    def are_single(self) -> bool:
        """Whether each grid is one block."""
        return len(self.numbers) == sum(self.sizes)

    def gather(self, grids: Sequence[Tensor]) -> Tensor:
        """The piece's grids in one new contiguous tensor (K, *block shape).

        Args:
            grids: All grids, in any memory layout.
        """
        own = [grids[number] for number in self.numbers]
        if self.are_single:
            return torch.stack(own)
        result = own[0].new_empty((sum(self.sizes), *self.block_shape))
        for target, grid in zip(self.split(result), own, strict=True):
            target.copy_(grid)
        return result

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The piece's grids as views of its tensor (K, *block shape)."""
        if self.are_single:
            return tensor.unbind()
        parts = tensor.split_with_sizes(self.sizes)
        return tuple(p.view(shape) for p, shape in zip(parts, self.shapes, strict=True))


def grids_of_pieces(
    grids: Sequence[BlockGrid], pieces: Sequence[Piece]
) -> tuple[GridsOfPiece, ...]:
    """For each piece the grids that fill it.

    Args:
        grids: Grids that cover all active blocks, each of blocks that are neighbours in a piece.
        pieces: The pieces, which cover them too.
    """
    numbers = {grid.positions[0]: number for number, grid in enumerate(grids)}
    result = []
    for piece in pieces:
        own = [numbers[position] for position in piece.positions if position in numbers]
        positions = [position for number in own for position in grids[number].positions]
        assert tuple(positions) == piece.positions
        result.append(
            GridsOfPiece(
                numbers=tuple(own),
                sizes=tuple(len(grids[number].positions) for number in own),
                shapes=tuple(tuple(grids[number].target.shape) for number in own),
                block_shape=piece.bucket.spec.shape,
            )
        )
    return tuple(result)
