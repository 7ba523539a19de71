"""Small per-block operations that the solvers share.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of at least 4 bytes.
_ALIGNMENT = 16
# Of a norm whose squares neither overflow nor lose digits in float32.
_SMALLEST_SAFE_NORM = 1e-15


def per_block(s_B: Tensor) -> Tensor:
    """See one number per block as (B, 1, 1), to multiply a stack by."""
    return s_B[:, None, None]


def diagonal(A_BNN: Tensor) -> Tensor:
    """(B, N) view of the diagonals; writing to it writes to the stack."""
    return A_BNN.diagonal(dim1=-2, dim2=-1)


def scaled(A_BNN: Tensor, scale_B: Tensor, shift_B: Tensor) -> Tensor:
    """scale·A + shift·I of each block as a new stack, in one pass.

    Args:
        A_BNN: (B, N, N) stack.
        scale_B: (B,) factors.
        shift_B: (B,) what is added to the diagonals.

    Returns:
        (B, N, N) stack.
    """
    result = A_BNN * per_block(scale_B)
    diagonal(result).add_(shift_B[:, None])
    return result


def damped(A_BNN: Tensor, epsilon: float) -> Tensor:
    """A + epsilon·I as a new stack, or `A` itself where epsilon is 0.

    Args:
        A_BNN: (B, N, N) stack.
        epsilon: A number.

    Returns:
        (B, N, N) stack.
    """
    if epsilon == 0.0:
        return A_BNN
    result = A_BNN.clone()
    diagonal(result).add_(epsilon)
    return result


def stacks_like(A_BNN: Tensor, count: int) -> tuple[Tensor, list[Tensor]]:
    """Uninitialised stacks of the shape of A in one piece of memory, so that one pass can sum them.

    Each begins at a multiple of 64 bytes: MKL's kernels sum in another order for a matrix that is not
    aligned to 16 bytes, and no block's result may depend on the size of its stack.

    Args:
        A_BNN: (B, N, N) stack.
        count: How many.

    Returns:
        (count, B·N·N) view of them all, and each as (B, N, N).
    """
    length = A_BNN.numel()
    flat = A_BNN.new_empty(count, -(-length // _ALIGNMENT) * _ALIGNMENT)[:, :length]
    return flat, [row.view(A_BNN.shape) for row in flat]


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
    """(B,) float64 ‖A‖_F; entries of 1e±30 neither overflow nor vanish in float32."""
    flat = A_BNN.flatten(1)
    if flat.device.type == "cpu" and flat.dtype == torch.float32:
        # Four times faster than sums in float64, which serve the blocks that need them.
        norm: Tensor = torch.linalg.vector_norm(flat, dim=1).double()
        is_safe = (norm > _SMALLEST_SAFE_NORM) & (norm < 1.0 / _SMALLEST_SAFE_NORM)
        if bool(is_safe.all()):
            return norm
        return torch.where(
            is_safe, norm, torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
        )
    exact: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    return exact


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
