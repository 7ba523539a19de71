"""Keeping columns orthonormal: a sketched test, a step of Newton-Schulz, Cholesky-QR.

Shape suffixes: Q_BNN and Y_BNN are stacks of B blocks with N columns; V_BKN K fixed vectors in rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dash_shampoo.eigenbasis.result import renewed
from dash_shampoo.inverse_root import InverseRootStatus
from dash_shampoo.inverse_root.residual import fixed_rows

# One step of Newton-Schulz takes an error e to 3/4·e²; from beyond this, more than one is needed.
_LARGEST_REPAIRABLE = 0.5


def orthogonality_error(Q: Tensor) -> Tensor:
    """‖V(QᵀQ - I)‖_F/‖V‖_F of each block, for four fixed rows V of ±1.

    Args:
        Q: (B, N, N) stack.

    Returns:
        (B,) errors; infinite where Q is not finite. In expectation over V it is ‖QᵀQ - I‖_F/√N.

    Note:
        8/N of a product; no host sync.

    Examples:
        >>> Q = torch.eye(8).expand(2, 8, 8).clone()
        >>> Q[1] *= 2.0
        >>> orthogonality_error(Q).tolist()
        [0.0, 3.0]
    """
    V = fixed_rows(Q.shape[-1], Q.dtype, Q.device)
    # Few rows from the left, (QVᵀ)ᵀ·Q: on a CPU five times faster than few columns from the right.
    V_BKN = V.expand(Q.shape[0], -1, -1)
    difference = torch.bmm(torch.bmm(V_BKN, Q.mT), Q) - V
    error: Tensor = torch.linalg.vector_norm(difference, dim=(-2, -1)) / V.numel() ** 0.5
    return error.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def restore_orthogonality(Q: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Q ← Q·(3I - QᵀQ)/2 where Q is off by more than the tolerance.

    Args:
        Q: (B, N, N) stack. May be modified.
        tolerance: Largest `orthogonality_error` of a block that is left as it is.

    Returns:
        The stack, and (B,) uint8: FAILED where Q was off by more than a step can mend.

    Note:
        16/N of a product, and 2 (one symmetric) for the blocks that are off; on a device for all of
        them, masked, so that nothing waits.
    """
    error = orthogonality_error(Q)
    failed = ~(error <= _LARGEST_REPAIRABLE)
    status = failed.to(torch.uint8) * int(InverseRootStatus.FAILED)
    is_off = error > tolerance
    (Q,) = renewed(is_off, lambda rows: (_newton_schulz(Q[rows]),), Q)
    return Q, status


def _newton_schulz(Q_BNN: Tensor) -> Tensor:
    """Q·(3I - QᵀQ)/2 of each block; 2 products."""
    return torch.baddbmm(Q_BNN, Q_BNN, torch.bmm(Q_BNN.mT, Q_BNN), beta=1.5, alpha=-0.5)


def cholesky_qr(Y: Tensor) -> Tensor:
    """The Q of Y = Q·R by two Cholesky decompositions, the first one shifted.

    The columns are scaled to length 1, which changes R alone; then G = YᵀY + sI = R₁ᵀR₁,
    Y₁ = Y·R₁⁻¹, and the same without the shift.

    Args:
        Y: (B, N, N) stack, columns in the order in which they are to be orthonormalised.

    Returns:
        (B, N, N) columns, orthonormal up to round-off where the condition number of the scaled Y is
        below about 1/√(machine epsilon), else less so; NaN for a block whose decomposition failed.

    Note:
        2 symmetric products, 2 Cholesky decompositions and 2 triangular solves; no host sync.

    References:
        Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, SIAM J. Sci. Comput. 42 (2020).
    """
    size = Y.shape[-1]
    tiny = torch.finfo(Y.dtype).tiny
    Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(tiny)
    shift = 11.0 * size * torch.finfo(Y.dtype).eps
    for extra in (shift, 0.0):
        G = torch.bmm(Y.mT, Y)
        G.diagonal(dim1=-2, dim2=-1).add_(extra)
        lower, info = torch.linalg.cholesky_ex(G)
        Y = torch.linalg.solve_triangular(lower.mT, Y, upper=True, left=False)
        Y = Y.masked_fill((info != 0)[:, None, None], torch.nan)
    return Y
