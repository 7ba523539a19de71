"""Multiples of the identity as operands: a pass that adds one saves another over the diagonals."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def multiple_of_identity(
    size: int, factor: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(N, N) factor·I, the same tensor for the same arguments; not to be written to."""
    return torch.eye(size, dtype=dtype, device=device).mul_(factor)
