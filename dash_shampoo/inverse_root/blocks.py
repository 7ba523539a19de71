"""Small per-block operations that the solvers share.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_block(s_B: Tensor) -> Tensor:
    """See one number per block as (B, 1, 1), to multiply a stack by."""
    return s_B[:, None, None]


def diagonal(A_BNN: Tensor) -> Tensor:
    """(B, N) view of the diagonals; writing to it writes to the stack."""
    return A_BNN.diagonal(dim1=-2, dim2=-1)


def damped(A_BNN: Tensor, epsilon: float | Tensor) -> Tensor:
    """A + epsilon·I as a new stack, or `A` itself where epsilon is the number 0.

    Args:
        A_BNN: (B, N, N) stack.
        epsilon: A number, or one per block (B,).

    Returns:
        (B, N, N) stack.
    """
    if isinstance(epsilon, Tensor):
        epsilon = epsilon[:, None]
    elif epsilon == 0.0:
        return A_BNN
    result = A_BNN.clone()
    diagonal(result).add_(epsilon)
    return result


def affine_identity_(A_BNN: Tensor, scale: float, shift: float) -> Tensor:
    """In place, A ← scale·A + shift·I."""
    A_BNN.mul_(scale)
    diagonal(A_BNN).add_(shift)
    return A_BNN


def max_abs(A_BNN: Tensor) -> Tensor:
    """(B,) largest absolute entry of each block; NaN where a block holds NaN."""
    return A_BNN.abs().amax(dim=(-2, -1))


def distance_to_identity(M_BNN: Tensor) -> Tensor:
    """(B,) max|M - I| of each block.

    The identity is subtracted from the diagonals in place and the diagonals are put back, which
    saves a copy of the stack.
    """
    entries = diagonal(M_BNN)
    saved = entries.clone()
    entries.sub_(1.0)
    distance = max_abs(M_BNN)
    entries.copy_(saved)
    return distance


def frobenius_norm(A_BNN: Tensor) -> Tensor:
    """(B,) ‖A‖_F, summed in float64: entries of 1e±30 neither overflow nor vanish in float32."""
    norm: Tensor = torch.linalg.vector_norm(A_BNN, dim=(-2, -1), dtype=torch.float64)
    return norm.to(A_BNN.dtype)


def power(values: Tensor, exponent: float) -> Tensor:
    """values^exponent, taken in float64 and rounded.

    torch's vectorised power differs by a unit in the last place between the inside of a tensor and
    its end; from float64 that doesn't reach float32, so no block's result depends on its place.

    Args:
        values: A tensor of numbers per block, such as scales or eigenvalues.
        exponent: The exponent.

    Returns:
        A tensor of the same shape and dtype.
    """
    return values.double().pow(exponent).to(values.dtype)


def rescaled_symmetric(X_BNN: Tensor, s_B: Tensor, exponent: float) -> Tensor:
    """s^exponent · (X + Xᵀ)/2 of each block: undo the scaling, and be exactly symmetric."""
    return (X_BNN + X_BNN.mT).mul_(per_block(power(s_B, exponent) * 0.5))
