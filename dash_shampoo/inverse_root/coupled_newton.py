"""Coupled inverse Newton iteration for an integer root, with a stopping rule per block.

Shape suffixes: A_BNN is a stack of B blocks of N×N; W of them are still iterating.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.config import CoupledNewtonConfig, ScaledCoupledNewtonConfig
from dash_shampoo.inverse_root.blocks import (
    affine_identity_,
    damped,
    distance_to_identity,
    frobenius_norm,
    per_block,
    power,
)
from dash_shampoo.inverse_root.matmul import Matmul, MatmulCounter
from dash_shampoo.inverse_root.result import InverseRootResult, InverseRootStatus, make_result
from dash_shampoo.inverse_root.scaling import compute_scale
from dash_shampoo.inverse_root.working_set import WorkingSet


def check(config: CoupledNewtonConfig, root: Fraction) -> None:
    """Refuse a root that is not an integer.

    Args:
        config: Unused; part of the signature of every check.
        root: p of A^(-1/p).

    Raises:
        ValueError: If the root's denominator is not 1.
    """
    if root.denominator != 1:
        raise ValueError(
            f"{root=} must be an integer for coupled Newton; EigenConfig, CoupledHigherOrderConfig "
            "and ChebyshevConfig take fractions."
        )


def coupled_newton(
    A: Tensor, root: Fraction, config: CoupledNewtonConfig, epsilon: float
) -> InverseRootResult:
    """A^(-1/p) by coupled Newton: X ← X·C, M ← Cᵖ·M with C = (1 + 1/p)·I - M/p.

        z = (p + 1)/(2s),  X_0 = z^(1/p)·I,  M_0 = z·(A + epsilon·I),  s = ‖A + epsilon·I‖_F

    M = Xᵖ(A + epsilon·I) throughout, and M → I. A block is done once max|M - I| <= tolerance or
    after `max_iterations` steps; its result is what it would be alone.

    The iteration converges where the eigenvalues of M_0 lie in (0, p + 1), which the scale ensures,
    quadratically once they are near 1; a small eigenvalue m of M grows by (1 + 1/p)^p a step, so it
    takes log(1/m)/(p·log(1 + 1/p)) steps to get there. With half-precision products the tolerance
    of 1e-6 is out of reach, and `max_iterations` ends it.

    Args:
        A: (B, N, N) stack, finite, float32 or float64. Not modified.
        root: p, a positive integer.
        config: `CoupledNewtonConfig`, or `ScaledCoupledNewtonConfig` with its choice of s and of
            the precision of the products.
        epsilon: Damping, at least 0.

    Returns:
        Roots, iterations and residual = max|M - I| per block. The status is MAX_ITERATIONS where
        the tolerance was not reached. A block of zeros with epsilon = 0 gives NaN, as in the base
        (a finite multiple of the identity with `ScaledCoupledNewtonConfig`).

    Note:
        Per step 3 matmuls for p = 2 and 4 for p = 4 (floor(log2 p) of them symmetric), one less in
        the first step, where X is a multiple of the identity. One host sync per step.

    References:
        Guo and Higham, A Schur-Newton method for the matrix pth root and its inverse, SIAM J.
        Matrix Anal. Appl. 28 (2006), iteration (3.4); Higham, Functions of Matrices, section 7.6.
        The stopping rule and scale are those of Distributed Shampoo.

    Examples:
        >>> A = torch.diag(torch.tensor([16.0, 81.0], dtype=torch.float64))[None]
        >>> result = coupled_newton(A, Fraction(4), CoupledNewtonConfig(), 0.0)
        >>> [round(x, 6) for x in result.value[0].diagonal().tolist()]
        [0.5, 0.333333]
    """
    counter = MatmulCounter(num_blocks=A.shape[0])
    A_ridge = damped(A, epsilon)
    if isinstance(config, ScaledCoupledNewtonConfig):
        matmul = Matmul(config.matmul_precision, counter)
        s_B = compute_scale(A_ridge, config.scaling, counter)
    else:
        matmul = Matmul("fp32", counter)
        s_B = frobenius_norm(A_ridge)
    p = root.numerator
    z_B = (p + 1) / (2 * s_B)
    value, error, iterations = _iterate(
        A_ridge * per_block(z_B), p, config.max_iterations, config.tolerance, matmul
    )
    # X was started at the identity, so that half-precision operands stay in range.
    value.mul_(per_block(power(z_B, 1.0 / p)))
    has_converged = error <= config.tolerance
    status = torch.where(has_converged, InverseRootStatus.SUCCESS, InverseRootStatus.MAX_ITERATIONS)
    return make_result(
        value,
        status=status.to(torch.uint8),
        iterations=iterations,
        residual=error,
        damping=epsilon,
        num_matmuls=counter.total,
        num_symmetric_matmuls=counter.symmetric,
    )


def _iterate(
    M: Tensor, p: int, max_iterations: int, tolerance: float, matmul: Matmul
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate X ← X·C, M ← Cᵖ·M from X = I, each block until its own end.

    Args:
        M: (B, N, N) scaled matrices; overwritten.
        p: The root.
        max_iterations: Cap on the steps.
        tolerance: A block is done once max|M - I| is at most this, or NaN.
        matmul: Products.

    Returns:
        X (B, N, N), the final max|M - I| (B,) and the iterations (B,).
    """
    device, num_blocks = M.device, M.shape[0]
    value = torch.empty_like(M)
    error = M.new_empty(num_blocks)
    iterations = torch.zeros(num_blocks, dtype=torch.int32, device=device)
    working = WorkingSet(num_blocks)
    X: Tensor | None = None  # the identity
    error_W = distance_to_identity(M)
    for iteration in range(max_iterations + 1):
        # The one host sync of a step: the stopping rule needs the errors.
        wants_more = (error_W > tolerance).cpu() & (iteration < max_iterations)
        rows, finished = (index.to(device) for index in working.retire(wants_more))
        if rows.numel() > 0:
            value[rows] = _identity_like(M) if X is None else X[finished]
            error[rows] = error_W[finished]
            iterations[rows] = iteration
        if working.is_done:
            break
        if X is None:
            (M,) = working.compact(M)
        else:
            X, M = working.compact(X, M)
        C = matmul.round(affine_identity_(M * (-1.0 / p), 1.0, 1.0 + 1.0 / p))
        X = C.to(M.dtype, copy=True) if X is None else matmul(X, C)
        M = matmul(matmul.power(C, p), M)
        error_W = distance_to_identity(M)
    return value, error, iterations


def _identity_like(M: Tensor) -> Tensor:
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
