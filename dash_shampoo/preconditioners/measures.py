"""What can be told of factor matrices and of what was computed of them, without decomposing any.

Measures are (B, 4) in float64, NaN where there is none:

    condition      condition number of the damped factor matrix, estimated from below
    residual       how far what is in use is from the factor matrix as it is now: of an inverse root its
                   sketched residual, of eigenvectors ‖offdiag(QᵀFQ)‖ / ‖F‖
    factor_norm    Frobenius norm of the factor matrix, bias-corrected
    root_norm      Frobenius norm of the inverse root

Shapes: B rows of a stack, N×N factor matrices.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.eigenbasis import is_identity
from dash_shampoo.inverse_root import PowerIterationScaling, sketched_residual
from dash_shampoo.inverse_root.scaling import multi_power_iteration

_ESTIMATE = PowerIterationScaling(num_iterations=20, num_vectors=4, matmul_precision="fp32")
NUM_TEMPORARIES = 6
"""Tensors of a stack's size that are there at a time."""


def measure_roots(A: Tensor, X: Tensor, root: float, damping: Tensor) -> Tensor:
    """Measures inverse roots X of (A + damping·I).

        condition = (λ_max(A) + damping)·λ_max(X)^p

    Args:
        A: (B, N, N) factor matrices, float32 or float64.
        X: (B, N, N) their inverse roots, of the same dtype; NaN is told of one that is the identity, the
            state before the first refresh, except for the norms.
        root: p.
        damping: (B,) what X was meant to have added to the diagonal.

    Returns:
        The measures.

    Note:
        About (42 + p)·4/N batched matmuls. No host synchronisation.
    """
    largest = multi_power_iteration(A, _ESTIMATE).double() + damping
    inverse = multi_power_iteration(X, _ESTIMATE).double()
    residual = sketched_residual(A, X, Fraction(root).limit_denominator(32), damping).double()
    is_new = _is_new(X)
    condition = (largest * inverse.pow(root)).masked_fill_(is_new, torch.nan)
    residual.masked_fill_(is_new, torch.nan)
    return torch.stack((condition, residual, _norm(A), _norm(X)), dim=1)


def measure_basis(A: Tensor, Q: Tensor, epsilon: float, scales: Tensor | None) -> Tensor:
    """Measures eigenvectors Q of A, by the diagonal of QᵀAQ.

    Args:
        A: (B, N, N) factor matrices.
        Q: (B, N, N) their eigenvectors.
        epsilon: Damping.
        scales: (B, N) the eigenvalues' inverse roots, where the method has any.

    Returns:
        The measures.

    Note:
        Two batched matmuls. No host synchronisation.
    """
    rotated = Q.mT @ A @ Q
    norm = _norm(A)
    eigenvalues = rotated.diagonal(dim1=-2, dim2=-1).double().clamp_min(0.0) + epsilon
    off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    is_new = _is_new(Q)
    condition = (eigenvalues.amax(-1) / eigenvalues.amin(-1)).masked_fill_(is_new, torch.nan)
    residual = (_norm(off_diagonal) / norm).masked_fill_(is_new, torch.nan)
    root_norm = torch.full_like(norm, torch.nan) if scales is None else _norm(scales)
    return torch.stack((condition, residual, norm, root_norm), dim=1)


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices.flatten(1), dim=1, dtype=torch.float64)
    return norms


def _is_new(matrices: Tensor) -> Tensor:
    """(B,) bool: the identity, the state before the first refresh; of one row it may be the result."""
    found = is_identity(matrices)
    return found if matrices.shape[-1] > 1 else torch.zeros_like(found)
