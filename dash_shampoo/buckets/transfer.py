"""Blocks into bucket tensors and back; on the CPU by one copy per parameter, not one per block.

The blocks of a parameter are views of it, cut in a regular grid; so where a run of a bucket's slots
belongs to one parameter, the whole run is one strided view of it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_shampoo.base import grid_view
from dash_shampoo.buckets.layout import Piece


@dataclass(frozen=True)
class Segment:
    """Neighbouring slots of a piece that are copied at once.

    Attributes:
        start: First slot, counted from the piece's first.
        stop: End.
        counts: Blocks in every dimension of the grid that they were cut in; None for blocks that are
            copied one by one.
    """

    start: int
    stop: int
    counts: tuple[int, ...] | None


def find_segments(
    piece: Piece, params: Sequence[Tensor], owners: Sequence[Hashable]
) -> tuple[Segment, ...]:
    """Finds the grids in which the blocks of a piece were cut.

    Args:
        piece: The piece.
        params: All local blocks of the group's parameters.
        owners: For each of them what tells its parameter from others.

    Returns:
        Segments that cover the piece in order.
    """
    segments: list[Segment] = []
    start = 0
    blocks = piece.blocks
    while start < len(blocks):
        stop = start + 1
        while stop < len(blocks) and owners[blocks[stop]] == owners[blocks[start]]:
            stop += 1
        counts = _grid_counts([params[i] for i in blocks[start:stop]]) if stop > start + 1 else None
        if counts is None and segments and segments[-1].counts is None:
            segments[-1] = Segment(segments[-1].start, stop, None)
        else:
            segments.append(Segment(start, stop, counts))
        start = stop
    return tuple(segments)


def gather(blocks: Sequence[Tensor], piece: Piece, segments: Sequence[Segment]) -> Tensor:
    """The blocks of a piece in one new contiguous tensor.

    Args:
        blocks: The active blocks, in any memory layout.
        piece: Which of them.
        segments: As `find_segments` gave them; where the blocks lie otherwise, they are copied one by
            one.

    Returns:
        (K, *shape).
    """
    members = [blocks[position] for position in piece.positions]
    # An accelerator joins 64 strided tensors in one launch, and a copy for each parameter is one each.
    if members[0].device.type != "cpu":
        return torch.stack(members)
    if len(segments) == 1 and segments[0].counts is None:
        return torch.stack(members)
    gathered = members[0].new_empty(len(members), *members[0].shape)
    for segment in segments:
        part, target = members[segment.start : segment.stop], gathered[segment.start : segment.stop]
        grid = None if segment.counts is None else grid_view(part, segment.counts)
        if grid is None:
            torch.stack(part, out=target)
        else:
            target.view(grid.shape).copy_(grid)
    return gathered


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


def _grid_counts(blocks: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The counts of the regular grid in which blocks lie in memory, last dimension fastest."""
    offsets = [block.data_ptr() - blocks[0].data_ptr() for block in blocks]
    counts: list[int] = []
    while len(offsets) > 1:
        run = 1
        while run < len(offsets) and offsets[run] == run * offsets[1]:
            run += 1
        if len(offsets) % run:
            return None
        counts.append(run)
        offsets = offsets[::run]
    counts.reverse()
    is_grid = math.prod(counts) == len(blocks) and grid_view(blocks, counts) is not None
    return tuple(counts) if is_grid else None
