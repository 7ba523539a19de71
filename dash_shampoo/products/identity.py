"""Multiples of the identity as operands: a pass that adds one saves another over the diagonals."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# In bytes. They are kept outside of every workspace, so all of them together are a few MiB. The products of
# larger matrices take so long that a launch more is nothing.
_LARGEST = 2**18


def has_identity(A: Tensor) -> bool:
    """Whether the identity for the blocks of a stack is small enough to be kept.

    Args:
        A: (B, N, N) stack.
    """
    return A.shape[-1] ** 2 * A.element_size() <= _LARGEST


@cache
def multiple_of_identity(
    size: int, factor: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(N, N) factor·I, the same tensor for the same arguments; not to be written to."""
    return torch.eye(size, dtype=dtype, device=device).mul_(factor)
