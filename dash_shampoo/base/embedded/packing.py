"""Symmetric matrices as their packed upper triangles: P = N(N+1)/2 entries, row by row."""

import math
from functools import cache

import torch
from torch import Tensor


def pack(matrices: Tensor) -> Tensor:
    """Upper triangles (..., P) of symmetric matrices (..., N, N)."""
    entries = matrices.flatten(-2)
    return entries.index_select(-1, _places(matrices.shape[-1], matrices.device)[0])


def unpack(packed: Tensor) -> Tensor:
    """Symmetric matrices (..., N, N) from upper triangles (..., P)."""
    size = (math.isqrt(1 + 8 * packed.shape[-1]) - 1) // 2
    count = packed.shape[:-1]
    # On the CPU three times faster than index_select along the second dimension.
    entries = packed.gather(-1, _places(size, packed.device)[1].expand(*count, -1))
    return entries.view(*count, size, size)


@cache
def packed_diagonal(size: int, device: torch.device) -> Tensor:
    """(N,) where the diagonal of an (N, N) matrix lies in its packed upper triangle."""
    # In closed form, for devices without values (meta) too.
    row = torch.arange(size, device=device)
    return row * size - row * (row - 1) // 2


@cache
def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat indices of the upper triangle (P,), and of each entry's place in it (N²,)."""
    row, column = torch.triu_indices(size, size, device=device)
    place = torch.empty(size, size, dtype=torch.int64, device=device)
    place[row, column] = place[column, row] = torch.arange(row.numel(), device=device)
    return row * size + column, place.flatten()
