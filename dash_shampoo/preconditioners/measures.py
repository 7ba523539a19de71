"""What can be told of factor matrices and of what was computed of them, without decomposing any.

Shapes: B rows of a stack, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.eigenbasis import is_identity
from dash_shampoo.inverse_root import PowerIterationScaling, sketched_residual
from dash_shampoo.inverse_root.scaling import multi_power_iteration

_ESTIMATE = PowerIterationScaling(num_iterations=20, num_vectors=4, matmul_precision="fp32")
# Tensors of a stack's size that are there at a time.
_NUM_TEMPORARIES = 6


@dataclass(frozen=True, eq=False)
class FactorMeasures:
    """Numbers of the factor matrices of a stack; float64, NaN where there is none.

    Attributes:
        condition (Tensor): (B,) condition number of the damped factor matrix, estimated from below.
        residual (Tensor): (B,) how far what is in use is from the factor matrix as it is now: of an
            inverse root its sketched residual, of eigenvectors ‖offdiag(QᵀFQ)‖ / ‖F‖.
        factor_norm (Tensor): (B,) Frobenius norms of the factor matrices, bias-corrected.
        root_norm (Tensor): (B,) Frobenius norms of the inverse roots.
    """

    condition: Tensor
    residual: Tensor
    factor_norm: Tensor
    root_norm: Tensor


def measure_roots(A: Tensor, X: Tensor, root: float, damping: Tensor) -> FactorMeasures:
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
    return FactorMeasures(
        condition=(largest * inverse.pow(root)).masked_fill_(is_new, torch.nan),
        residual=residual.masked_fill_(is_new, torch.nan),
        factor_norm=_norm(A),
        root_norm=_norm(X),
    )


def measure_basis(A: Tensor, Q: Tensor, epsilon: float, scales: Tensor | None) -> FactorMeasures:
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
    condition = eigenvalues.amax(-1) / eigenvalues.amin(-1)
    return FactorMeasures(
        condition=condition.masked_fill_(is_new, torch.nan),
        residual=(_norm(off_diagonal) / norm).masked_fill_(is_new, torch.nan),
        factor_norm=norm,
        root_norm=torch.full_like(norm, torch.nan)
        if scales is None
        else torch.linalg.vector_norm(scales, dim=-1, dtype=torch.float64),
    )


def measure_in_chunks(
    measure: Callable[[slice], FactorMeasures],
    count: int,
    size: int,
    itemsize: int,
    max_workspace_bytes: int,
) -> FactorMeasures:
    """Measures the rows of a stack, as many at a time as the cap on memory allows.

    Args:
        measure: Gives the measures of some rows.
        count: Number of rows.
        size: N.
        itemsize: Bytes of an entry.
        max_workspace_bytes: The cap.

    Returns:
        The measures of all rows.
    """
    step = max(max_workspace_bytes // (_NUM_TEMPORARIES * max(size, 1) ** 2 * itemsize), 1)
    parts = [measure(slice(i, min(i + step, count))) for i in range(0, count, step)]
    names = [field.name for field in fields(FactorMeasures)]
    return FactorMeasures(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _norm(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices.flatten(1), dim=1, dtype=torch.float64)
    return norms


def _is_new(matrices: Tensor) -> Tensor:
    """(B,) bool: the identity, the state before the first refresh; of one row it may be the result."""
    found = is_identity(matrices)
    return found if matrices.shape[-1] > 1 else torch.zeros_like(found)
