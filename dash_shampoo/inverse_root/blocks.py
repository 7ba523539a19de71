"""Small per-block operations that the solvers share.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dash_shampoo.products import has_identity, multiple_of_identity

# Where reading a value is no host synchronisation.
_READABLE_DEVICES = {"cpu"}
# Entries of at least 4 bytes.
_ALIGNMENT = 16
# Of a norm whose squares neither overflow nor lose digits in float32.
_SMALLEST_SAFE_NORM = 1e-15


def can_look(tensor: Tensor) -> bool:
    """Whether the values of a tensor, and of what is made of it, can be read without waiting for a device."""
    return tensor.device.type in _READABLE_DEVICES


def is_known_to_be(value: bool, flags: Tensor) -> bool:
    """Whether all flags are `value`, or False where only a host sync could tell."""
    return can_look(flags) and bool((flags if value else ~flags).all())


def finite_blocks(A: Tensor) -> Tensor:
    """(B,) bool: whether all entries of a block are finite."""
    if can_look(A):
        # Sums of finite entries are finite but for overflow, and take one pass without a copy.
        is_finite = torch.isfinite(A.sum(dim=(-2, -1)))
        if bool(is_finite.all()):
            return is_finite
        return torch.isfinite(A).flatten(1).all(dim=1)
    largest: Tensor = torch.linalg.vector_norm(A.flatten(1), ord=torch.inf, dim=1)
    return largest < torch.inf


def cleaned(A_BNN: Tensor, *, looks: bool = False) -> tuple[Tensor, Tensor | None]:
    """The identity in place of the blocks that are not finite.

    Args:
        A_BNN: (B, N, N) stack.
        looks: Whether the host may wait for the device, to see whether there is such a block.

    Returns:
        The stack, and which of its blocks were finite (B,); None where all are known to be.
    """
    is_finite = finite_blocks(A_BNN)
    if (looks or can_look(A_BNN)) and bool(is_finite.all()):
        return A_BNN, None
    identity = torch.eye(A_BNN.shape[-1], dtype=A_BNN.dtype, device=A_BNN.device)
    return torch.where(per_block(is_finite), A_BNN, identity), is_finite


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


def divided(A: Tensor, divisor: float | Tensor) -> Tensor:
    """A/divisor as a new tensor, or `A` itself where the divisor is known to be 1."""
    if isinstance(divisor, Tensor):
        # Kernels for operands of two dtypes are slow ones.
        return A / divisor.to(torch.promote_types(A.dtype, torch.float32))
    return A if divisor == 1.0 else A / divisor


def affine(A_BNN: Tensor, factor: float, shift: float, out: Tensor | None = None) -> Tensor:
    """factor·A + shift·I of each block, in one pass; `out` may be A. Default: a new stack."""
    if not has_identity(A_BNN):
        result = torch.mul(A_BNN, factor, out=out)
        diagonal(result).add_(shift)
        return result
    identity = multiple_of_identity(A_BNN.shape[-1], shift, A_BNN.dtype, A_BNN.device)
    return torch.add(identity, A_BNN, alpha=factor, out=out)


def scaled(
    A_BNN: Tensor,
    scale_B: Tensor,
    shift_B: Tensor,
    shift_factor: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """scale·A + shift_factor·shift·I of each block, in one pass.

    Args:
        A_BNN: (B, N, N) stack.
        scale_B: (B,) factors.
        shift_B: (B,) what is added to the diagonals.
        shift_factor: Of that; a number, or a scalar on the device. Default: 1.
        out: (B, N, N) stack to write to. Default: a new one.

    Returns:
        (B, N, N) stack.
    """
    result = torch.mul(A_BNN, per_block(scale_B), out=out)
    if isinstance(shift_factor, Tensor):
        diagonal(result).add_(shift_B[:, None] * shift_factor)
    elif shift_factor != 0.0:
        diagonal(result).add_(shift_B[:, None], alpha=shift_factor)
    return result


def damped(A_BNN: Tensor, epsilon: float) -> Tensor:
    """A + epsilon·I as a new stack, or `A` itself where epsilon is 0.

    Args:
        A_BNN: (B, N, N) stack.
        epsilon: A number.

    Returns:
        (B, N, N) stack.
    """
    return A_BNN if epsilon == 0.0 else affine(A_BNN, 1.0, epsilon)


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


def max_abs(A_BNN: Tensor) -> Tensor:
    """(B,) largest absolute entry of each block; NaN where a block holds NaN."""
    return A_BNN.abs().amax(dim=(-2, -1))


def distance_to_identity(M_BNN: Tensor) -> Tensor:
    """(B,) max|M - I| of each block.

    The identity is subtracted from the diagonals in place and the diagonals are put back, which
    saves a copy of the stack on the CPU.
    """
    if not can_look(M_BNN):  # two kernels instead of five
        difference = affine(M_BNN, -1.0, 1.0).flatten(1)
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
    is_safe = None
    if can_look(A_BNN) and A_BNN.dtype == torch.float32:
        # Four times faster than sums in float64, which serve the blocks that need them.
        norm: Tensor = torch.linalg.vector_norm(A_BNN, dim=(-2, -1)).double()
        is_safe = (norm > _SMALLEST_SAFE_NORM) & (norm < 1.0 / _SMALLEST_SAFE_NORM)
        if bool(is_safe.all()):
            return norm
    exact: Tensor = torch.linalg.vector_norm(A_BNN, dim=(-2, -1), dtype=torch.float64)
    return exact if is_safe is None else torch.where(is_safe, norm, exact)


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
