"""Inverse roots of a single matrix: A^(-1/p) by eigendecomposition or coupled iterations."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base.embedded.distributed_configs import not_implemented
from dash_shampoo.base.embedded.matrix_function_configs import (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    PerturbationConfig,
    PseudoInverseConfig,
    RankDeficientStabilityConfig,
    RootInvConfig,
)

logger = logging.getLogger(__name__)

# A coupled iteration of higher order is taken for failed when ‖A Xᵖ - I‖_max ends above this.
_LARGEST_RESIDUAL = 1e-1
# … and for stagnating or diverging when a step multiplies its error by more than this.
_LARGEST_GROWTH = 1.2


def check_supported(config: RootInvConfig, root: float | None = None) -> None:
    """Refuses what `matrix_inverse_root` cannot do.

    Args:
        config: The solver.
        root: The root p, if known.

    Raises:
        NotImplementedError: If the embedded base has no such solver or repair of the spectrum.
        ValueError: If the solver cannot do this root.
    """
    if type(config) not in (EigenConfig, CoupledNewtonConfig, CoupledHigherOrderConfig):
        raise not_implemented(f"amortized_computation_config={config!r}")
    if isinstance(config, EigenConfig):
        stability = config.rank_deficient_stability_config
        if type(stability) not in (PerturbationConfig, PseudoInverseConfig):
            raise not_implemented(f"rank_deficient_stability_config={stability!r}")
    if isinstance(config, CoupledNewtonConfig) and root is not None and not root.is_integer():
        raise ValueError(
            f"Invalid root={root}: CoupledNewtonConfig needs an integer root; use EigenConfig or "
            "CoupledHigherOrderConfig, or another inverse_exponent_override."
        )


def matrix_inverse_root(
    A: Tensor, root: Fraction, config: RootInvConfig, epsilon: float = 0.0
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
    if A.dim() != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"Invalid A.shape={tuple(A.shape)}: must be a square matrix.")
    check_supported(config, float(root))
    match config:
        case EigenConfig():
            return _by_eigendecomposition(A, root, config, epsilon)
        case CoupledNewtonConfig():
            return _by_coupled_newton(A, root.numerator, config, epsilon)
        case CoupledHigherOrderConfig():
            with _tf32_disabled(config.disable_tf32 and A.is_cuda):
                return _by_coupled_higher_order(A, root, config)
        case _:
            raise not_implemented(f"amortized_computation_config={config!r}")


def _by_eigendecomposition(
    A: Tensor, root: Fraction, config: EigenConfig, epsilon: float
) -> Tensor:
    stability = config.rank_deficient_stability_config
    if isinstance(stability, PseudoInverseConfig) and epsilon != 0.0:
        raise ValueError(
            f"Invalid epsilon={epsilon}: must be 0.0 when PseudoInverseConfig is used."
        )
    if isinstance(stability, PerturbationConfig) and stability.perturb_before_computation:
        A = _damped(A, epsilon)
    L, Q = _eigh(A, config)
    result: Tensor = Q * _inverse_power(L, root, stability, epsilon) @ Q.T
    return result


def _eigh(A: Tensor, config: EigenConfig) -> tuple[Tensor, Tensor]:
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
    L: Tensor, root: Fraction, stability: RankDeficientStabilityConfig, epsilon: float
) -> Tensor:
    """λ^(-1/root) of eigenvalues made positive, without a host sync."""
    exponent = -1.0 / root
    if isinstance(stability, PseudoInverseConfig):
        rtol = stability.rank_rtol
        if rtol is None:
            rtol = L.numel() * torch.finfo(L.dtype).eps
        cutoff = torch.clamp(rtol * L.max().relu(), min=stability.rank_atol)
        return torch.where(cutoff >= L, 0.0, L.pow(exponent))
    smallest = L.min()
    if isinstance(stability, PerturbationConfig) and stability.perturb_before_computation:
        # The matrix was damped already: only a spectrum that still reaches below epsilon moves.
        L = torch.where(smallest < epsilon, (L - smallest) + epsilon, L)
    else:
        L = (L - smallest.clamp(max=0.0)) + epsilon
    return L.pow(exponent)


def _damped(A: Tensor, epsilon: float | Tensor) -> Tensor:
    if isinstance(epsilon, float) and epsilon == 0.0:
        return A
    return A + epsilon * torch.eye(A.shape[0], dtype=A.dtype, device=A.device)


def _by_coupled_newton(A: Tensor, p: int, config: CoupledNewtonConfig, epsilon: float) -> Tensor:
    """X₀ = z^(1/p) I, M₀ = zA, z = (p+1)/(2‖A‖_F); C = (1+1/p)I - M/p; X ← XC, M ← CᵖM."""
    identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    A = _damped(A, epsilon)
    z = (p + 1) / (2 * torch.linalg.norm(A))
    X: Tensor = z.pow(1 / p) * identity
    M = z * A
    error = torch.dist(M, identity, p=torch.inf)
    iteration = 0
    while error > config.tolerance and iteration < config.max_iterations:
        iteration += 1
        C = M.mul(-1 / p).add_(identity, alpha=1 + 1 / p)
        X = X @ C
        M = torch.linalg.matrix_power(C, p) @ M
        error = torch.dist(M, identity, p=torch.inf)
    if not error <= config.tolerance:
        logger.warning(
            "The coupled Newton iteration ended at max_iterations=%d with |M - I| = %s.",
            config.max_iterations,
            error.item(),
        )
    return X


def _by_coupled_higher_order(A: Tensor, root: Fraction, config: CoupledHigherOrderConfig) -> Tensor:
    """As coupled Newton with C = Σ_{i<order} bᵢ (I - M)ⁱ, b the series of (1 - x)^(-1/p).

    A first step of order 2 brings M into the region of convergence. Source: Lakić, "On the
    computation of the matrix k-th root", ZAMM 78 (1998).
    """
    p, q = root.numerator, root.denominator
    identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
    lambda_max_bound = torch.linalg.matrix_norm(A, torch.inf)
    if not torch.isfinite(lambda_max_bound):
        raise ArithmeticError("The norm of the matrix is not finite.")
    A = _damped(A, torch.clamp(lambda_max_bound * config.rel_epsilon, min=config.abs_epsilon))
    coefficients = [1.0]
    for i in range(1, config.order):
        coefficients.append(coefficients[-1] * (1 + (i - 1) * p) / (i * p))

    z = torch.trace(A).reciprocal()
    C = (z * A).mul_(-1 / p).add_(identity, alpha=1 + 1 / p)
    X: Tensor = z.pow(1 / p) * C
    M = torch.linalg.matrix_power(C, p) @ (z * A)
    error = torch.linalg.vector_norm(M - identity, torch.inf)
    iteration = 1
    while error > config.tolerance and iteration < config.max_iterations:
        iteration += 1
        residual = identity - M
        C = residual.mul(coefficients[-1]).add_(identity, alpha=coefficients[-2])
        for b in reversed(coefficients[:-2]):
            C = torch.addmm(identity, C, residual, beta=b)
        X = X @ C
        M = torch.linalg.matrix_power(C, p) @ M
        previous, error = error, torch.linalg.vector_norm(M - identity, torch.inf)
        if error > previous * _LARGEST_GROWTH or (error == previous and error < 1e-3):
            break
    else:
        if error > config.tolerance:
            logger.warning(
                "The coupled iteration of order %d ended at max_iterations=%d with |M - I| = %s.",
                config.order,
                config.max_iterations,
                error.item(),
            )
    residual_norm = torch.linalg.vector_norm(
        A @ torch.linalg.matrix_power(X, p) - identity, torch.inf
    )
    if residual_norm > _LARGEST_RESIDUAL:
        raise ArithmeticError(
            f"The inverse root is inaccurate: |A X^p - I| = {residual_norm.item()} exceeds "
            f"{_LARGEST_RESIDUAL}."
        )
    X = torch.linalg.matrix_power(X, q)
    if not torch.isfinite(X).all():
        raise ArithmeticError("The inverse root is not finite.")
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
