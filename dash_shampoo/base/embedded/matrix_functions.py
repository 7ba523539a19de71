"""Inverse roots of a single matrix: A^(-1/p) by eigendecomposition or coupled iterations."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dash_shampoo.base.embedded import matrix_function_configs as configs
from dash_shampoo.base.embedded.distributed_configs import not_implemented
from dash_shampoo.base.embedded.matrix_function_configs import check

logger = logging.getLogger(__name__)

# A coupled iteration of higher order is taken for failed when ‖A Xᵖ - I‖_max ends above this.
_LARGEST_RESIDUAL = 1e-1
# … and for stagnating or diverging when a step multiplies its error by more than this.
_LARGEST_GROWTH = 1.2

_CoupledConfig: TypeAlias = configs.CoupledNewtonConfig | configs.CoupledHigherOrderConfig


def check_supported(config: configs.RootInvConfig, root: float | None = None) -> None:
    """Refuses what `matrix_inverse_root` cannot do.

    Args:
        config: The solver.
        root: The root p, if known.

    Raises:
        NotImplementedError: If the embedded base has no such solver or repair of the spectrum.
        ValueError: If the solver cannot do this root.
    """
    if type(config) not in _SOLVERS:
        raise not_implemented(f"amortized_computation_config={config!r}")
    if isinstance(config, configs.EigenConfig):
        stability = config.rank_deficient_stability_config
        if type(stability) not in (configs.PerturbationConfig, configs.PseudoInverseConfig):
            raise not_implemented(f"rank_deficient_stability_config={stability!r}")
    if isinstance(config, configs.CoupledNewtonConfig) and root is not None:
        allowed = (
            "whole, as CoupledNewtonConfig needs an integer root; use EigenConfig or "
            "CoupledHigherOrderConfig, or another inverse_exponent_override"
        )
        check(root.is_integer(), "root", root, allowed)


def matrix_inverse_root(
    A: Tensor, root: Fraction, config: configs.RootInvConfig, epsilon: float = 0.0
) -> Tensor:
    """Computes (A + epsilon·I)^(-1/root).

    Args:
        A: (N, N), symmetric and positive semi-definite up to rounding; not modified.
        root: p, positive.
        config: The solver.
        epsilon: Damping; CoupledHigherOrderConfig has its own instead.

    Returns:
        (N, N), of the dtype of A.

    Raises:
        ArithmeticError: If the iteration of higher order failed.
        ValueError: If A is not a square matrix or the root cannot be done.
    """
    is_square = A.dim() == 2 and A.shape[0] == A.shape[1]
    check(is_square, "A.shape", tuple(A.shape), "a square matrix")
    check_supported(config, float(root))
    return _SOLVERS[type(config)](A, root, config, epsilon)


def _by_eigendecomposition(
    A: Tensor, root: Fraction, config: configs.EigenConfig, epsilon: float
) -> Tensor:
    stability = config.rank_deficient_stability_config
    if isinstance(stability, configs.PseudoInverseConfig):
        check(epsilon == 0.0, "epsilon", epsilon, "0.0 when PseudoInverseConfig is used")
    if isinstance(stability, configs.PerturbationConfig) and stability.perturb_before_computation:
        A = _damped(A, epsilon)
    L, Q = _eigh(A, config)
    result: Tensor = Q * _inverse_power(L, root, stability, epsilon) @ Q.T
    return result


def _eigh(A: Tensor, config: configs.EigenConfig) -> tuple[Tensor, Tensor]:
    work = A
    if config.eigendecomposition_offload_device:
        work = A.to(config.eigendecomposition_offload_device)
    try:
        L, Q = torch.linalg.eigh(work)
    except RuntimeError as error:
        if not config.retry_double_precision or work.dtype == torch.float64:
            raise
        logger.warning("eigh failed in %s (%s); repeating in float64.", work.dtype, error)
        L, Q = torch.linalg.eigh(work.double())
    return L.to(A), Q.to(A)


def _inverse_power(
    L: Tensor, root: Fraction, stability: configs.RankDeficientStabilityConfig, epsilon: float
) -> Tensor:
    """λ^(-1/root) of eigenvalues made positive, without a host sync."""
    exponent = -1.0 / root
    if isinstance(stability, configs.PseudoInverseConfig):
        rtol = stability.rank_rtol
        if rtol is None:
            rtol = L.numel() * torch.finfo(L.dtype).eps
        cutoff = torch.clamp(rtol * L.max().relu(), min=stability.rank_atol)
        return torch.where(cutoff >= L, 0.0, L.pow(exponent))
    smallest = L.min()
    if isinstance(stability, configs.PerturbationConfig) and stability.perturb_before_computation:
        # The matrix was damped already: only a spectrum that still reaches below epsilon moves.
        L = torch.where(smallest < epsilon, (L - smallest) + epsilon, L)
    else:
        L = (L - smallest.clamp(max=0.0)) + epsilon
    return L.pow(exponent)


def _damped(A: Tensor, epsilon: float | Tensor) -> Tensor:
    return A + epsilon * _identity(A)


def _identity(A: Tensor) -> Tensor:
    return torch.eye(A.shape[0], dtype=A.dtype, device=A.device)


def _by_coupled_newton(
    A: Tensor, root: Fraction, config: configs.CoupledNewtonConfig, epsilon: float
) -> Tensor:
    """The coupled iteration of order 2, with z = (p+1)/(2‖A‖_F)."""
    A = _damped(A, epsilon)
    z = (root.numerator + 1) / (2 * torch.linalg.norm(A))
    return _coupled_iteration(A, z, root.numerator, config)


def _by_coupled_higher_order(
    A: Tensor, root: Fraction, config: configs.CoupledHigherOrderConfig, epsilon: float
) -> Tensor:
    """The coupled iteration with z = 1/tr(A), which ends where it stagnates, and is tested."""
    del epsilon
    p, q = root.numerator, root.denominator
    lambda_max_bound = torch.linalg.matrix_norm(A, torch.inf)
    if not torch.isfinite(lambda_max_bound):
        raise ArithmeticError("The norm of the matrix is not finite.")
    A = _damped(A, torch.clamp(lambda_max_bound * config.rel_epsilon, min=config.abs_epsilon))
    with _tf32_disabled(config.disable_tf32 and A.is_cuda):
        X = _coupled_iteration(A, torch.trace(A).reciprocal(), p, config)
        residual = torch.dist(A @ torch.linalg.matrix_power(X, p), _identity(A), p=torch.inf)
        if residual > _LARGEST_RESIDUAL:
            raise ArithmeticError(
                f"The inverse root is inaccurate: |A X^p - I| = {residual.item()} exceeds "
                f"{_LARGEST_RESIDUAL}."
            )
        X = X.matrix_power(q)
    if not torch.isfinite(X).all():
        raise ArithmeticError("The inverse root is not finite.")
    return X


def _coupled_iteration(A: Tensor, z: Tensor, p: int, config: _CoupledConfig) -> Tensor:
    """A^(-1/p): X₀ = z^(1/p) I, M₀ = zA; C = Σ_{i<order} bᵢ (I - M)ⁱ, X ← XC, M ← CᵖM.

    Newton's iteration has order 2; b is the series of (1 - x)^(-1/p). The first step is of order 2: it
    brings M into the region of convergence. Source: Lakić, "On the computation of the matrix k-th root",
    ZAMM 78 (1998).
    """
    order = getattr(config, "order", 2)
    coefficients = [1.0]
    for i in range(1, order):
        coefficients.append(coefficients[-1] * (1 + (i - 1) * p) / (i * p))
    identity = _identity(A)
    X: Tensor = z.pow(1 / p) * identity
    M = z * A
    error = torch.dist(M, identity, p=torch.inf)
    iteration = 0
    while error > config.tolerance and iteration < config.max_iterations:
        iteration += 1
        *rest, b, c = coefficients if iteration > 1 else coefficients[:2]
        residual = identity - M
        C = residual.mul(c).add_(identity, alpha=b)
        for b in reversed(rest):
            C = torch.addmm(identity, C, residual, beta=b)
        X = X @ C
        M = torch.linalg.matrix_power(C, p) @ M
        previous, error = error, torch.dist(M, identity, p=torch.inf)
        has_stagnated = error > previous * _LARGEST_GROWTH or (error == previous and error < 1e-3)
        if isinstance(config, configs.CoupledHigherOrderConfig) and iteration > 1 and has_stagnated:
            return X
    if not error <= config.tolerance:
        logger.warning(
            "The coupled iteration of order %d ended at max_iterations=%d with |M - I| = %s.",
            order,
            config.max_iterations,
            error.item(),
        )
    return X


@contextmanager
def _tf32_disabled(disable: bool) -> Iterator[None]:
    """Switches tf32 off for a while. The flag is global: other threads see it, too."""
    flags = torch.backends.cuda.matmul
    if not (disable and flags.allow_tf32):
        yield
        return
    flags.allow_tf32 = False
    try:
        yield
    finally:
        flags.allow_tf32 = True


_SOLVERS: dict[type[configs.RootInvConfig], Callable[[Tensor, Fraction, Any, float], Tensor]] = {
    configs.EigenConfig: _by_eigendecomposition,
    configs.CoupledNewtonConfig: _by_coupled_newton,
    configs.CoupledHigherOrderConfig: _by_coupled_higher_order,
}
