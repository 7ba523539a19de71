"""Coupled higher-order iteration for a fractional root, as the base defines it, for a whole stack.

Shape suffixes: A_BNN is a stack of B blocks of N×N; W of them are still iterating.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base import CoupledHigherOrderConfig
from dash_shampoo.inverse_root.blocks import (
    affine,
    diagonal,
    distance_to_identity,
    max_abs,
    per_block,
    power,
    scaled,
)
from dash_shampoo.inverse_root.result import InverseRootStatus
from dash_shampoo.inverse_root.solver import Solution, Solver
from dash_shampoo.inverse_root.working_set import WorkingSet
from dash_shampoo.products import Products

# The base's constants: growth of max|M - I| that counts as divergence, the error below which an
# unchanged one counts as stagnation, and the final error above which the result is refused.
_DIVERGENCE_FACTOR = 1.2
_STAGNATION_BELOW = 1e-3
_MAX_TRUE_ERROR = 1e-1

# Powers of the numerator are taken by products; beyond this they can only overflow.
_MAX_NUMERATOR = 1000


def check(config: CoupledHigherOrderConfig, root: Fraction) -> None:
    """Refuse an order below 2 and a root that is no fraction of small numbers.

    Args:
        config: The order of the method.
        root: p/q of A^(-q/p).

    Raises:
        ValueError: If `order` is below 2, or the root's numerator is above 1000.
    """
    if config.order < 2:
        raise ValueError(f"order={config.order} must be at least 2 for CoupledHigherOrderConfig.")
    if root.numerator > _MAX_NUMERATOR:
        raise ValueError(
            f"{root=} must be a fraction of small numbers for CoupledHigherOrderConfig; "
            "EigenConfig and ChebyshevConfig take any root."
        )


def coupled_higher_order(
    A: Tensor, root: Fraction, config: CoupledHigherOrderConfig, epsilon: float
) -> Solution:
    """A^(-q/p) by X ← X·T(M), M ← T(M)ᵖ·M, T the truncated binomial series of M^(-1/p) at I.

        λ̂ = ‖A‖_∞,  ε = max(rel_epsilon·λ̂, abs_epsilon),  z = 1/tr(A + ε·I)
        X_0 = z^(1/p)·I,  M_0 = z·(A + ε·I),  one Newton step, then
        T(M) = Σ_{i<order} b_i (I - M)^i,  b_i = Π_{j=1..i} (1 + (j-1)p)/(jp)
        result X^q

    A block is done once e = max|M - I| <= tolerance, after `max_iterations` steps, or when e has
    grown by more than 1.2 or stands still below 1e-3 (round-off is reached). Then the true error
    max|(A + ε·I)Xᵖ - I| decides: above 0.1 the block FAILED.

    The order of convergence is `order`. The first Newton step brings every eigenvalue into the
    region where the series converges. A numerator of 10 or more is slow and loses digits.

    Args:
        A: (B, N, N) stack, finite, float32 or float64. Not modified.
        root: p/q, positive.
        config: Damping (relative and absolute), cap, tolerance, order.
        epsilon: Unused, as in the base: the damping is the config's.

    Returns:
        Roots, iterations, and residual = the true error per block. Status MAX_ITERATIONS where the
        cap ended the iteration, FAILED where the true error is above 0.1, ‖A‖_∞ overflows or the
        root is not finite.

    Note:
        Per step order + log2(p) matmuls for p a power of two, floor(log2 p) of them symmetric;
        1 + log2(p) at the end, and the powers of q. One host sync per step. TF32 is used only
        where `disable_tf32` is False and torch allows it.

    References:
        Lakić, On the computation of the matrix k-th root, ZAMM 78 (1998); Higham, Functions of
        Matrices, section 7.6. Scale, stopping rule and error check are those of Distributed
        Shampoo.

    Examples:
        >>> config = CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0)
        >>> A = torch.diag(torch.tensor([8.0, 27.0], dtype=torch.float64))[None]
        >>> solution = coupled_higher_order(A, Fraction(3, 2), config, 0.0)
        >>> [round(x, 6) for x in solution.X[0].diagonal().tolist()]
        [0.25, 0.111111]
    """
    products = Products.with_tf32(A, is_wanted=not config.disable_tf32)
    p, q = root.numerator, root.denominator

    lambda_max_B = A.abs().sum(dim=-1).amax(dim=-1)
    epsilon_B = torch.clamp(lambda_max_B * config.rel_epsilon, min=config.abs_epsilon)
    A_ridge = scaled(A, torch.ones_like(epsilon_B), epsilon_B)
    z_B = torch.reciprocal(diagonal(A_ridge).sum(dim=-1))
    value, iterations, is_capped = _iterate(A_ridge * per_block(z_B), p, config, products)
    value.mul_(per_block(power(z_B, 1.0 / p)))

    true_error = distance_to_identity(products(A_ridge, products.power(value, p)))
    if q > 1:
        value = products.power(value, q)
    status = is_capped.to(torch.uint8) * int(InverseRootStatus.MAX_ITERATIONS)
    # The base raises ArithmeticError for each of these, which counts as a failed computation.
    is_failed = (
        (true_error > _MAX_TRUE_ERROR)
        | ~torch.isfinite(lambda_max_B)
        | ~torch.isfinite(max_abs(value))
    )
    status.masked_fill_(is_failed, int(InverseRootStatus.FAILED))
    return Solution(
        value,
        damping=epsilon_B,
        is_symmetric=True,
        status=status,
        iterations=iterations,
        residual=true_error,
    )


def _series_coefficients(p: int, order: int) -> list[float]:
    """b_0 … b_(order-1) of the binomial series of x^(-1/p) in powers of 1 - x."""
    coefficients, numerator, denominator = [1.0], 1, 1
    for i in range(1, order):
        numerator *= 1 + (i - 1) * p
        denominator *= i * p
        coefficients.append(numerator / denominator)
    return coefficients


def _iterate(
    M: Tensor, p: int, config: CoupledHigherOrderConfig, products: Products
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate from X = I, each block until its own end.

    Args:
        M: (B, N, N) scaled matrices; overwritten.
        p: The root's numerator.
        config: Cap, tolerance, order.
        products: Products.

    Returns:
        X (B, N, N), the iterations (B,), and whether the cap ended them above the tolerance (B,).
    """
    b = _series_coefficients(p, config.order)
    working = WorkingSet(M.shape[0])

    # One step of plain Newton first; its X = I·C needs no product.
    X = affine(M, -1.0 / p, 1.0 + 1.0 / p)
    M = products(products.power(X, p), M)
    error_W = distance_to_identity(M)
    is_stopped = torch.zeros_like(error_W, dtype=torch.bool)
    iteration = 1
    while True:
        is_above = (error_W > config.tolerance) & ~is_stopped
        # The one host sync of a step: the stopping rule needs the errors.
        wants_more = is_above.cpu() & (iteration < config.max_iterations)
        iterations = torch.full_like(error_W, iteration, dtype=torch.int32)
        working.retire(wants_more, X, iterations, is_above)
        if working.is_done:
            value, iterations, is_capped = working.results
            return value, iterations, is_capped
        X, M, error_W = working.compact(X, M, error_W)
        D = affine(M, -1.0, 1.0)
        T = affine(D, b[-1], b[-2])
        for coefficient in reversed(b[:-2]):
            T = products(T, D)
            diagonal(T).add_(coefficient)
        X = products(X, T)
        M = products(products.power(T, p), M)
        iteration += 1
        new_error_W = distance_to_identity(M)
        is_stopped = (new_error_W > error_W * _DIVERGENCE_FACTOR) | (
            (new_error_W == error_W) & (error_W < _STAGNATION_BELOW)
        )
        # A block that has stopped keeps its last error, as in the base.
        error_W = torch.where(is_stopped, error_W, new_error_W)


SOLVER = Solver(
    solve=coupled_higher_order,
    # The ridge, X, M, I - M, T, powers and the next ones of them, beside the roots.
    workspace=lambda config, root: 8,
    check=check,
    # The host looks after every step.
    waits=lambda config: True,
)
