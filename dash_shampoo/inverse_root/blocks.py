"""Small per-block operations that the solvers share.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dash_shampoo.products import has_identity, multiple_of_identity

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


# Nothing on a device is ever thrown out of its cache: a captured step reads it for good.
@cache
def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(K,) numbers on the device, where copying them anew would wait for it; not to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)


def is_one(number: float | Tensor) -> bool:
    """Whether a number is known to be 1; of one on a device nothing is known."""
    return not isinstance(number, Tensor) and number == 1.0


def divided(A: Tensor, divisor: float | Tensor) -> Tensor:
    """A/divisor as a new tensor, or `A` itself where the divisor is known to be 1."""
    if isinstance(divisor, Tensor):
        # Kernels for operands of two dtypes are slow ones.
        return A / divisor.to(torch.promote_types(A.dtype, torch.float32))
    return A if divisor == 1.0 else A / divisor


def add_multiple_(entries: Tensor, addend: Tensor, factor: float | Tensor) -> Tensor:
    """In place, entries ← entries + factor·addend, with a factor of the host's or a scalar on the device."""
    if isinstance(factor, Tensor):
        return entries.add_(addend * factor)
    return entries.add_(addend, alpha=factor)


def minus_multiple(A_BNN: Tensor, factor: float, shift: float, out: Tensor | None = None) -> Tensor:
    """shift·I - factor·A of each block, in one pass; `out` may be A. Default: a new stack."""
    if not has_identity(A_BNN):
        result = torch.mul(A_BNN, -factor, out=out)
        diagonal(result).add_(shift)
        return result
    identity = multiple_of_identity(A_BNN.shape[-1], shift, A_BNN.dtype, A_BNN.device)
    return torch.sub(identity, A_BNN, alpha=factor, out=out)


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


def damped_scaled(A_BNN: Tensor, scale_B: Tensor, epsilon: float) -> Tensor:
    """scale·(A + epsilon·I) of each block as a new stack, in one pass.

    Args:
        A_BNN: (B, N, N) stack.
        scale_B: (B,) factors.
        epsilon: What is added to the diagonals.

    Returns:
        (B, N, N) stack.
    """
    result = A_BNN * per_block(scale_B)
    if epsilon != 0.0:
        diagonal(result).add_(scale_B[:, None], alpha=epsilon)
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
    saves a copy of the stack on the CPU.
    """
    if M_BNN.device.type != "cpu":  # two kernels instead of five
        difference = minus_multiple(M_BNN, 1.0, 1.0).flatten(1)
        norm: Tensor = torch.linalg.vector_norm(difference, ord=torch.inf, dim=1)
        return norm
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


def power(values: Tensor, exponent: float, dtype: torch.dtype | None = None) -> Tensor:
    """values^exponent, taken in float64 and rounded.

    torch's vectorised power differs by a unit in the last place between the inside of a tensor and
    its end; from float64 that doesn't reach float32, so no block's result depends on its place.

    Args:
        values: A tensor of numbers per block, such as scales or eigenvalues.
        exponent: The exponent.
        dtype: Of the result. Default: that of the values.

    Returns:
        A tensor of the same shape.
    """
    result = torch.empty_like(values, dtype=values.dtype if dtype is None else dtype)
    return torch.pow(values.double(), exponent, out=result)
