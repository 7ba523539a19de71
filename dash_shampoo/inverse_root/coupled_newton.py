"""Coupled inverse Newton iteration for an integer root, with a stopping rule per block.

Shape suffixes: A_BNN is a stack of B blocks of N×N; W of them are still iterating.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base import CoupledNewtonConfig
from dash_shampoo.inverse_root.blocks import affine, distance_to_identity, power, scaled
from dash_shampoo.inverse_root.fields import check_field, check_positive_int, is_number
from dash_shampoo.inverse_root.scaling import ScaledConfig, compute_scale, damped_frobenius_norm
from dash_shampoo.inverse_root.solver import Solution, Solver
from dash_shampoo.inverse_root.working_set import WorkingSet
from dash_shampoo.products import Products

# On an accelerator: a cap up to which all steps are done unseen, and the steps between looks beyond it.
_MAX_UNSEEN_STEPS = 16
_STEPS_BETWEEN_LOOKS = 4


@dataclass(kw_only=True)
class ScaledCoupledNewtonConfig(ScaledConfig, CoupledNewtonConfig):
    """Coupled inverse Newton iteration with a choice of scaling and matmul precision.

    With `FrobeniusScaling` and "fp32" it is the base's `CoupledNewtonConfig`. Choose this when ten
    steps are meant as a cheap damped root (``max_iterations=10``), or half-precision products are.

    Attributes:
        max_iterations (int): Cap on the steps. (Default: 100)
        tolerance (float): A block is done once max|M - I| is at most this. (Default: 1e-6)
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    def __post_init__(self) -> None:
        check_positive_int(self, "max_iterations", at_least=0)
        is_tolerance = is_number(self.tolerance) and self.tolerance >= 0.0
        check_field(self, "tolerance", is_tolerance, "at least 0")
        super().__post_init__()


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
    after `max_iterations` steps; its result is what it would be alone. On an accelerator, where looking
    means waiting, the host looks after every fourth step, and with a cap of at most 16 never: what a
    block then does beyond its tolerance is rounding.

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
        the first step, where X is a multiple of the identity. One host sync per look; none with a cap
        of at most 16 steps.

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
        s_B = damped_frobenius_norm(A, epsilon).nan_to_num_(nan=torch.nan, posinf=torch.nan)
    p = root.numerator
    z_B = s_B.reciprocal().mul_((p + 1) / 2)
    z = z_B.to(A.dtype)
    M = scaled(A, z, z, epsilon)
    X, error, iterations = _iterate(M, p, config.max_iterations, config.tolerance, products)
    # True is MAX_ITERATIONS; an error of NaN is not below the tolerance.
    status = (error <= config.tolerance).logical_not_().view(torch.uint8)
    return Solution(
        X,
        damping=epsilon,
        # X was started at the identity, so that half-precision operands stay in range.
        scale=power(z_B, 1.0 / p, A.dtype),
        is_symmetric=True,
        status=status,
        iterations=iterations,
        residual=error,
        size=s_B,
    )


def _iterate(
    M: Tensor, p: int, max_iterations: int, tolerance: float, products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate X ← X·C, M ← Cᵖ·M from X = I, each block until a look finds it done.

    Args:
        M: (B, N, N) scaled matrices; overwritten.
        p: The root.
        max_iterations: Cap on the steps.
        tolerance: A block is done once max|M - I| is at most this, or NaN.
        products: Products.

    Returns:
        X (B, N, N), the final max|M - I| (B,) and the iterations (B,).
    """
    working = WorkingSet(M.shape[0])
    X: Tensor | None = None  # the identity
    interval = _steps_between_looks(M.device, max_iterations)
    for iteration in range(max_iterations + 1):
        is_last = iteration == max_iterations
        if is_last or (iteration % interval == 0 and (iteration > 0 or interval == 1)):
            error = distance_to_identity(M)
            if is_last:
                wants_more = torch.zeros(len(M), dtype=torch.bool, device="cpu")
            else:  # the one host sync of a look
                wants_more = (error > tolerance).cpu()
            if not bool(wants_more.all()):
                if X is None:
                    X = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).repeat(len(M), 1, 1)
                iterations = torch.full_like(error, iteration, dtype=torch.int32)
                working.retire(wants_more, X, error, iterations)
                if working.is_done:
                    break
                X, M = working.compact(X, M)
        X, M = _step(X, M, p, products)
    value, error, iterations = working.results
    return value, error, iterations


def _steps_between_looks(device: torch.device, max_iterations: int) -> int:
    """After how many steps the host looks which blocks are done; on an accelerator it has to wait for that.

    Steps beyond the tolerance change a root by rounding alone.
    """
    if device.type == "cpu":
        return 1
    return max_iterations if max_iterations <= _MAX_UNSEEN_STEPS else _STEPS_BETWEEN_LOOKS


def _step(X: Tensor | None, M: Tensor, p: int, products: Products) -> tuple[Tensor, Tensor]:
    """X·C and Cᵖ·M; X = None is the identity."""
    C = affine(M, -1.0 / p, 1.0 + 1.0 / p)
    rounded_C = products.round(C)
    X = rounded_C.to(M.dtype) if X is None else products(X, rounded_C)
    return X, products(products.power(rounded_C, p), M)


def _workspace(config: CoupledNewtonConfig, root: Fraction) -> int:
    """X, M, C, its powers and the next M, beside the roots that are done; operands that are rounded."""
    is_rounded = isinstance(config, ScaledCoupledNewtonConfig) and config.matmul_precision != "fp32"
    return 12 if is_rounded else 6


SOLVER = Solver(
    solve=coupled_newton,
    workspace=_workspace,
    check=check,
    # With a low cap the host never looks.
    waits=lambda config: config.max_iterations > _MAX_UNSEEN_STEPS,
)
