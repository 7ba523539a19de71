"""Coupled inverse Newton iteration for an integer root, with a stopping rule per block.

Shape suffixes: A_BNN is a stack of B blocks of N×N; W of them are still iterating.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base import CoupledNewtonConfig
from dash_shampoo.inverse_root.blocks import diagonal, distance_to_identity, power, scaled
from dash_shampoo.inverse_root.fields import (
    check_field,
    check_matmul_precision,
    check_positive_int,
    is_number,
)
from dash_shampoo.inverse_root.result import InverseRootStatus, Solution
from dash_shampoo.inverse_root.scaling import (
    FrobeniusScaling,
    ScalingConfig,
    check_scaling,
    compute_scale,
    damped_frobenius_norm,
)
from dash_shampoo.inverse_root.solver import Solver
from dash_shampoo.inverse_root.working_set import WorkingSet
from dash_shampoo.products import MatmulPrecision, Products


@dataclass(kw_only=True)
class ScaledCoupledNewtonConfig(CoupledNewtonConfig):
    """Coupled inverse Newton iteration with a choice of scaling and matmul precision.

    With `FrobeniusScaling` and "fp32" it is the base's `CoupledNewtonConfig`. Choose this when ten
    steps are meant as a cheap damped root (``max_iterations=10``), or half-precision products are.

    Attributes:
        max_iterations (int): Cap on the steps. (Default: 100)
        tolerance (float): A block is done once max|M - I| is at most this. (Default: 1e-6)
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    scaling: ScalingConfig = field(default_factory=FrobeniusScaling)
    matmul_precision: MatmulPrecision = "fp32"

    def __post_init__(self) -> None:
        check_positive_int(self, "max_iterations", at_least=0)
        is_tolerance = is_number(self.tolerance) and self.tolerance >= 0.0
        check_field(self, "tolerance", is_tolerance, "at least 0")
        check_scaling(self)
        check_matmul_precision(self)


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
) -> Solution:
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
        Roots times z^(-1/p), iterations and residual = max|M - I| per block. The status is
        MAX_ITERATIONS where the tolerance was not reached. A block of zeros with epsilon = 0 gives NaN, as
        in the base (a finite multiple of the identity with `ScaledCoupledNewtonConfig`).

    Note:
        Per step 3 matmuls for p = 2 and 4 for p = 4 (floor(log2 p) of them symmetric), one less in
        the first step, where X is a multiple of the identity. One host sync per step.

    References:
        Guo and Higham, A Schur-Newton method for the matrix pth root and its inverse, SIAM J.
        Matrix Anal. Appl. 28 (2006), iteration (3.4); Higham, Functions of Matrices, section 7.6.
        The stopping rule and scale are those of Distributed Shampoo.

    Examples:
        >>> A = torch.diag(torch.tensor([16.0, 81.0], dtype=torch.float64))[None]
        >>> solution = coupled_newton(A, Fraction(4), CoupledNewtonConfig(), 0.0)
        >>> [round(x, 6) for x in (solution.X * solution.scale)[0].diagonal().tolist()]
        [0.5, 0.333333]
    """
    if isinstance(config, ScaledCoupledNewtonConfig):
        products = Products(config.matmul_precision)
        s_B = compute_scale(A, config.scaling, epsilon)
    else:
        products = Products("fp32")
        s_B = damped_frobenius_norm(A, epsilon).to(A.dtype)
        s_B = s_B + (s_B - s_B)  # inf becomes NaN
    p = root.numerator
    z_B = (p + 1) / (2 * s_B)
    M = scaled(A, z_B, epsilon * z_B)
    X, error, iterations = _iterate(M, p, config.max_iterations, config.tolerance, products)
    has_converged = error <= config.tolerance
    status = torch.where(has_converged, InverseRootStatus.SUCCESS, InverseRootStatus.MAX_ITERATIONS)
    return Solution(
        X,
        damping=epsilon,
        # X was started at the identity, so that half-precision operands stay in range.
        scale=power(z_B, 1.0 / p),
        is_symmetric=True,
        status=status.to(torch.uint8),
        iterations=iterations,
        residual=error,
    )


def _iterate(
    M: Tensor, p: int, max_iterations: int, tolerance: float, products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate X ← X·C, M ← Cᵖ·M from X = I, each block until its own end.

    Args:
        M: (B, N, N) scaled matrices; overwritten.
        p: The root.
        max_iterations: Cap on the steps.
        tolerance: A block is done once max|M - I| is at most this, or NaN.
        products: Products.

    Returns:
        X (B, N, N), the final max|M - I| (B,) and the iterations (B,).
    """
    device, num_blocks = M.device, M.shape[0]
    value: Tensor | None = None
    error = M.new_empty(num_blocks)
    iterations = torch.zeros(num_blocks, dtype=torch.int32, device=device)
    working = WorkingSet(num_blocks)
    X: Tensor | None = None  # the identity
    error_W = distance_to_identity(M)
    for iteration in range(max_iterations + 1):
        # The one host sync of a step: the stopping rule needs the errors.
        wants_more = (error_W > tolerance).cpu() & (iteration < max_iterations)
        rows, finished = (index.to(device) for index in working.retire(wants_more))
        if rows.numel() == num_blocks:  # all of them at once
            return _or_identity(X, M), error_W, iterations.fill_(iteration)
        if rows.numel() > 0:
            value = (
                torch.empty(num_blocks, *M.shape[1:], dtype=M.dtype, device=device)
                if (value is None)
                else value
            )
            value[rows] = _or_identity(X, M)[finished]
            error[rows] = error_W[finished]
            iterations[rows] = iteration
        if working.is_done:
            break
        if X is None:
            (M,) = working.compact(M)
        else:
            X, M = working.compact(X, M)
        X, M = _step(X, M, p, products)
        error_W = distance_to_identity(M)
    assert value is not None
    return value, error, iterations


def _step(X: Tensor | None, M: Tensor, p: int, products: Products) -> tuple[Tensor, Tensor]:
    """X·C and Cᵖ·M; X = None is the identity."""
    C = torch.mul(M, -1.0 / p)
    diagonal(C).add_(1.0 + 1.0 / p)
    rounded_C = products.round(C)
    X = rounded_C.to(M.dtype, copy=True) if X is None else products(X, rounded_C)
    return X, products(products.power(rounded_C, p), M)


def _or_identity(X: Tensor | None, M: Tensor) -> Tensor:
    if X is not None:
        return X
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).repeat(M.shape[0], 1, 1)


def _workspace(config: CoupledNewtonConfig, root: Fraction) -> int:
    """X, M, C, its powers and the next M, beside the roots that are done; operands that are rounded."""
    is_rounded = isinstance(config, ScaledCoupledNewtonConfig) and config.matmul_precision != "fp32"
    return 12 if is_rounded else 6


SOLVER = Solver(solve=coupled_newton, workspace=_workspace, check=check)
