"""What to do with a block whose inverse root can't be used: more damping, then clamped eigenvalues."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base import EigenConfig, RootInvConfig
from dash_shampoo.inverse_root.blocks import finite_blocks, max_abs, per_block, power, scaled
from dash_shampoo.inverse_root.eigen import decompose
from dash_shampoo.inverse_root.registry import as_root, find_solver
from dash_shampoo.inverse_root.residual import norm_from_below
from dash_shampoo.inverse_root.result import (
    InverseRootResult,
    InverseRootStatus,
    StackOutcome,
    failures,
)
from dash_shampoo.inverse_root.stack import inverse_root
from dash_shampoo.products import exact_products

_RESIDUAL_THRESHOLD = 0.3
_FACTORS = (10.0, 100.0)
_POWER_STEPS = 8


def repair(
    A: Tensor, root: int | float | Fraction, config: RootInvConfig, epsilon: float, damping: Tensor
) -> InverseRootResult:
    """Roots of blocks on which the solver failed: by more damping, else by clamped eigenvalues.

    First the same solver is tried with 10 and with 100 times the damping. What is still bad is decomposed,
    (max(λ, 0) + δ)^(-1/p), so that no eigenvalue of the root exceeds δ^(-1/p): negative eigenvalues, which
    only rounding or a bug can cause, don't lower the damping of the others.

    Args:
        A: (B, N, N) the matrices; few, and not modified.
        root: p of A^(-1/p).
        config: The solver that failed.
        epsilon: The damping that it was given.
        damping: (B,) the damping δ that it aimed at; where that is not positive and finite, machine epsilon
            times the largest entry of the matrix is taken.

    Returns:
        The roots, tested, and with the damping of each. NON_FINITE_INPUT where A is not finite, and
        NON_FINITE_RESULT for a block of zeros without damping.

    Raises:
        ValueError: As of `inverse_root`.

    Note:
        Waits for the device. The eigendecomposition is for the blocks alone that more damping did not mend.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, -1e-2]))[None]
        >>> result = repair(A, 2, EigenConfig(), 0.0, torch.tensor([1e-4]))
        >>> [round(x, 1) for x in result.value[0].diagonal().tolist()]
        [1.0, 100.0]
    """
    fraction = as_root(root)
    damping = torch.where(
        (damping > 0.0) & damping.isfinite(), damping, torch.finfo(A.dtype).eps * max_abs(A)
    )
    is_finite = finite_blocks(A)
    bad = is_finite.nonzero().flatten()
    status = torch.full_like(is_finite, int(InverseRootStatus.NON_FINITE_INPUT), dtype=torch.uint8)
    result = StackOutcome(status, damping.clone()).result(torch.full_like(A, torch.nan), A.dtype)
    for factor in _FACTORS if find_solver(config).has_residual else ():
        if len(bad) == 0:
            break
        again = _by_more_damping(A[bad], root, config, epsilon, factor * damping[bad])
        # Sign flips, which a residual can't see for even p, would show as eigenvalues too large.
        largest = norm_from_below(again.value, _POWER_STEPS)
        is_bounded = largest <= power(damping[bad], -1.0 / fraction)
        is_good = again.is_usable & is_bounded
        _replace_(result, bad[is_good], again, is_good)
        bad = bad[~is_good]
    if len(bad) > 0:
        last = _by_eigenvalues(A[bad], fraction, damping[bad])
        _replace_(result, bad, last, torch.ones_like(bad, dtype=torch.bool))
    return result


def _by_more_damping(
    A: Tensor, root: int | float | Fraction, config: RootInvConfig, epsilon: float, extra: Tensor
) -> InverseRootResult:
    """The solver's own roots of A + extra·I."""
    more = scaled(A, torch.ones_like(extra), extra)
    result = inverse_root(more, root, config, epsilon, _RESIDUAL_THRESHOLD)
    return replace(result, damping=result.damping + extra)


def _by_eigenvalues(A: Tensor, root: Fraction, damping: Tensor) -> InverseRootResult:
    """(max(λ, 0) + damping)^(-1/p) by the eigendecomposition; FAILED where that does not converge."""
    L_BN, V_BNN, failed = decompose(A, EigenConfig())
    f_BN = power(L_BN.clamp_min(0.0) + damping[:, None], -1.0 / root)
    with exact_products(A.device):
        value = (V_BNN * f_BN[:, :, None]).mT @ V_BNN
    status = failures(failed, A).masked_fill(
        ~finite_blocks(value), int(InverseRootStatus.NON_FINITE_RESULT)
    )
    value.masked_fill_(per_block(status > 0), torch.nan)
    return StackOutcome(status, damping).result(value, A.dtype)


def _replace_(
    result: InverseRootResult, rows: Tensor, by: InverseRootResult, is_taken: Tensor
) -> None:
    """Write the rows `is_taken` of one result to the rows `rows` of another."""
    for name in ("value", "status", "iterations", "residual", "damping"):
        getattr(result, name)[rows] = getattr(by, name)[is_taken]
