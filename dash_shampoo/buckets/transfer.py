"""Blocks into bucket tensors and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.buckets.layout import Piece


def gather(blocks: Sequence[Tensor], piece: Piece) -> Tensor:
    """The blocks of a piece in one new contiguous tensor.

    Args:
        blocks: The active blocks, in any memory layout.
        piece: Which of them.

    Returns:
        (K, *shape).
    """
    return torch.stack([blocks[position] for position in piece.positions])


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
