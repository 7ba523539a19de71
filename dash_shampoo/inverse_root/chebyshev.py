"""One Chebyshev polynomial of the scaled stack, for any root.

Shape suffixes: A_BNN is a stack of B blocks of N×N.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.blocks import (
    constants,
    diagonal,
    power,
    scaled,
    stacks_like,
)
from dash_shampoo.inverse_root.fields import (
    check_choice,
    check_field,
    check_positive_int,
    is_int,
    is_number,
)
from dash_shampoo.inverse_root.scaling import ScaledConfig, compute_scale
from dash_shampoo.inverse_root.solver import Solution, Solver
from dash_shampoo.products import Products, weighted_sum

logger = logging.getLogger(__name__)

# A fit that is off by more than its own target, somewhere on the interval.
_POOR_FIT = 1.0


ChebyshevEvaluation = Literal["baby_step_giant_step", "clenshaw"]


@dataclass(kw_only=True)
class ChebyshevConfig(ScaledConfig, RootInvConfig):
    """A Chebyshev polynomial fitted to x^(-1/root) on [relative_epsilon, 1 + relative_epsilon].

    It takes any positive root and needs no sync. Choose this to reproduce DASH, or for a root
    that no Newton iteration has. One polynomial can't follow x^(-1/root) near 0: with degree 60
    and relative_epsilon 1e-2 / 1e-3 / 1e-4 the root is within 1e-6 / 0.01 / 0.2 of its target;
    with the paper's 1e-10 it is off by up to 2 times for root 4 (0.3 for eigenvalues above
    1e-3·s), and by 4 times for root 2, which is warned of.

    Attributes:
        degree (int): Degree of the polynomial, at least 1. (Default: 60)
        relative_epsilon (float): Damping of the fit relative to s: the target is
            (A/s + relative_epsilon·I)^(-1/root). In (0, 1]. (Default: 1e-10)
        num_nodes (int): Chebyshev nodes of the fit, more than `degree`. (Default: 10000)
        evaluation (str): "baby_step_giant_step" needs about 2√degree matmuls and the workspace of
            as many stacks as there are baby steps (6 for degree 60); "clenshaw" needs degree - 1
            matmuls and four stacks. (Default: "baby_step_giant_step")
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    degree: int = 60
    relative_epsilon: float = 1e-10
    num_nodes: int = 10_000
    evaluation: ChebyshevEvaluation = "baby_step_giant_step"

    def __post_init__(self) -> None:
        check_positive_int(self, "degree")
        is_epsilon = is_number(self.relative_epsilon) and 0.0 < self.relative_epsilon <= 1.0
        check_field(self, "relative_epsilon", is_epsilon, "in (0, 1]")
        is_count = is_int(self.num_nodes) and self.num_nodes > self.degree
        check_field(self, "num_nodes", is_count, "an integer above degree")
        check_choice(self, "evaluation", ChebyshevEvaluation)
        super().__post_init__()


def check(config: ChebyshevConfig, root: Fraction) -> None:
    """Accept every positive root; warn once of a polynomial that is far from it.

    Args:
        config: Degree and interval.
        root: p of A^(-1/p).
    """
    _warn_of_poor_fit(float(root), *_fit_of(config))


def _fit_of(config: ChebyshevConfig) -> tuple[int, float, int]:
    return config.degree, config.relative_epsilon, config.num_nodes


@lru_cache(maxsize=64)
def _warn_of_poor_fit(root: float, degree: int, relative_epsilon: float, num_nodes: int) -> None:
    error = fit_error(root, degree, relative_epsilon, num_nodes)
    if error > _POOR_FIT:
        logger.warning(
            "A Chebyshev polynomial of degree %d misses x^(-1/%g) on [%g, 1] by a factor of %.1f; "
            "a relative_epsilon of 1e-3 or more, or another solver, gives the root.",
            *(degree, root, relative_epsilon, 1.0 + error),
        )


def chebyshev(A: Tensor, root: Fraction, config: ChebyshevConfig, epsilon: float) -> Solution:
    """A^(-1/p) ≈ s^(-1/p)·Σ c_k T_k(S) with S = 2(A + epsilon·I)/s - I, c fitted to x^(-1/p).

    The fit is at `num_nodes` Chebyshev nodes of x in [δ, 1 + δ], δ = `relative_epsilon`, with
    S = 2(x - δ) - 1, so the target is ((A + epsilon·I)/s + δ·I)^(-1/p). Eigenvalues of A/s must be
    at most 1: beyond it the polynomial grows without bound. Within it the error falls like
    ρ^(-degree), ρ = 1 + 2δ + 2√(δ(1 + δ)): fast for δ >= 0.01, while for δ far below degree^-2 the
    small eigenvalues are off by a factor.

    Args:
        A: (B, N, N) stack, finite, float32 or float64. Not modified.
        root: p, any positive number.
        config: Degree, interval, evaluation, scale, precision of the products.
        epsilon: Damping, at least 0.

    Returns:
        Roots times s^(1/p), symmetric up to rounding. A block of zeros with epsilon = 0 gives about
        relative_epsilon^(-1/p)·I, as far as the polynomial reaches.

    Note:
        "clenshaw": degree - 1 matmuls. "baby_step_giant_step": 7 / 11 / 14 / 18 / 27 matmuls for
        degree 20 / 40 / 60 / 100 / 200. No host sync. The coefficients are computed once per
        degree, root and interval, and kept.

    References:
        DASH, arXiv 2602.02016, Chebyshev polynomials by Clenshaw's recurrence (without the factor
        s^(-1/p)); Clenshaw, Math. Comp. 9 (1955); Paterson and Stockmeyer, SIAM J. Comput. 2
        (1973), carried to the Chebyshev basis.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))[None]
        >>> config = ChebyshevConfig(degree=60, relative_epsilon=1e-2)
        >>> solution = chebyshev(A, Fraction(2), config, 0.0)
        >>> [round(x, 4) for x in (solution.X * solution.scale)[0].diagonal().tolist()]
        [0.9945, 1.3987]
    """
    products = Products(config.matmul_precision)
    s_B = compute_scale(A, config.scaling, epsilon)
    factor_B = power(s_B, -1.0, A.dtype).mul_(2.0)
    S = scaled(A, factor_B, factor_B, epsilon)
    diagonal(S).sub_(1.0)
    coefficients = fit_inverse_root(float(root), *_fit_of(config))
    damping_B = torch.empty_like(s_B, dtype=A.dtype)
    damping = constants((epsilon,), s_B.dtype, s_B.device)
    torch.add(damping, s_B, alpha=config.relative_epsilon, out=damping_B)
    return Solution(
        chebyshev_sum(S, coefficients, products, _num_baby_steps(config)),
        damping=damping_B,
        scale=power(s_B, -1.0 / float(root), A.dtype),
        size=s_B,
    )


@lru_cache(maxsize=64)
def fit_inverse_root(
    root: float, degree: int, relative_epsilon: float, num_nodes: int
) -> tuple[float, ...]:
    """Fit x^(-1/root) on [δ, 1 + δ] in the Chebyshev basis, in float64.

        c_k = (2/K) Σ_j f(x_j) cos(k θ_j),  θ_j = π(j + 1/2)/K,  x_j = cos²(θ_j/2) + δ,  c_0 halved

    which is least squares at the K nodes, by the discrete orthogonality of the T_k.

    Args:
        root: p.
        degree: Degree of the polynomial, below `num_nodes`.
        relative_epsilon: δ.
        num_nodes: K.

    Returns:
        degree + 1 coefficients of T_0 … T_degree.

    References:
        Trefethen, Approximation Theory and Approximation Practice, chapter 4.

    Examples:
        >>> [round(c, 3) for c in fit_inverse_root(1.0, 2, 1.0, 1000)]
        [0.707, -0.243, 0.042]
    """
    nodes = torch.arange(num_nodes, dtype=torch.float64, device="cpu")
    theta = (nodes + 0.5) * (math.pi / num_nodes)
    # (t + 1)/2 = cos²(θ/2) without the cancellation near t = -1, where f is steep.
    values = (torch.cos(theta / 2).square() + relative_epsilon).pow(-1.0 / root)
    coefficients = [
        float((values * torch.cos(k * theta)).sum()) * 2.0 / num_nodes for k in range(degree + 1)
    ]
    coefficients[0] /= 2.0
    return tuple(coefficients)


@lru_cache(maxsize=64)
def fit_error(root: float, degree: int, relative_epsilon: float, num_nodes: int) -> float:
    """Find the largest relative error of the fit, max |P(x)·x^(1/root) - 1| over [δ, 1 + δ].

    Args:
        root: p.
        degree: Degree of the polynomial.
        relative_epsilon: δ.
        num_nodes: Nodes of the fit.

    Returns:
        The maximum over 4001 points that are dense at both ends.

    Examples:
        >>> 0.001 < fit_error(4.0, 60, 1e-3, 10_000) < 0.01
        True
    """
    theta = torch.linspace(0.0, math.pi, 4001, dtype=torch.float64, device="cpu")
    P = torch.zeros_like(theta)
    for k, c in enumerate(fit_inverse_root(root, degree, relative_epsilon, num_nodes)):
        P.add_(torch.cos(k * theta), alpha=c)
    x = torch.cos(theta / 2).square() + relative_epsilon
    return float((P * x.pow(1.0 / root) - 1.0).abs().max())


def chebyshev_sum(
    S: Tensor, coefficients: tuple[float, ...], products: Products, num_baby_steps: int
) -> Tensor:
    """Σ c_k T_k(S) = Σ_i B_i(S)·T_(i·m)(S), B_i of degree below m, by Clenshaw's rule in T_m.

    The baby steps T_2 … T_m come from T_(i+j) = 2·T_i·T_j - T_|i-j|; the giant steps are
    b_i = B_i + 2·T_m·b_(i+1) - b_(i+2), and the result is B_0 + T_m·b_1 - b_2. With m = 1 it is Clenshaw's
    recurrence.

    Args:
        S: (B, N, N) symmetric stack with eigenvalues in [-1, 1]. Not modified.
        coefficients: c_0 … c_degree, degree at least 1.
        products: Products.
        num_baby_steps: m, from 1 to the degree.

    Returns:
        (B, N, N) stack.

    Note:
        m - 1 + ⌊degree/m⌋ matmuls, one less where m divides the degree. The baby steps are kept: m stacks of
        workspace, and three for the giant steps. Two elementwise passes a giant step, one with m = 1.
    """
    size, table = num_baby_steps, split_coefficients(coefficients, num_baby_steps)
    flat, T = stacks_like(S, size)
    T[0].copy_(S)
    for k in range(2, size + 1):
        low, high = k // 2, k - k // 2
        if low == high:
            products.square(T[low - 1], out=T[k - 1], alpha=2.0, shift=-1.0)
        else:
            products(T[low - 1], T[high - 1], out=T[k - 1], alpha=2.0).sub_(S)
    T_m = products.round(T[size - 1])
    b_next, b_after = _combined(flat, T, table[-1], None), None
    is_constant = all(c == 0.0 for c in table[-1][1:])  # the first giant step is then free
    for i in reversed(range(len(table) - 1)):
        factor = 1.0 if i == 0 else 2.0
        b = _combined(flat, T, table[i], b_after)
        if is_constant:
            b.add_(T[size - 1], alpha=factor * table[-1][0])
            is_constant = False
        else:
            b = products.add_to_(b, T_m, b_next, alpha=factor)
        b_next, b_after = b, b_next
    return b_next


def _combined(
    flat: Tensor, T: list[Tensor], coefficients: tuple[float, ...], less: Tensor | None
) -> Tensor:
    """c_0 I + Σ_j c_j T_j of the stacks T, (m, B·N·N) as one, in one pass; minus a stack in another."""
    size = len(coefficients)
    if size == 1:
        result = torch.zeros_like(T[0]) if less is None else -less
    else:
        weights = constants(coefficients[1:], flat.dtype, flat.device)
        result = torch.empty_like(T[0])
        weighted_sum(flat[: size - 1], weights, result.view(-1))
        result = result if less is None else result.sub_(less)
    diagonal(result).add_(coefficients[0])
    return result


def fewest_baby_steps(degree: int) -> int:
    """The number of baby steps for which a degree takes the fewest matmuls, about its square root."""
    return min(range(1, degree + 1), key=lambda m: (m - 1 + degree // m - (degree % m == 0), m))


@lru_cache(maxsize=64)
def split_coefficients(
    coefficients: tuple[float, ...], num_baby_steps: int
) -> tuple[tuple[float, ...], ...]:
    """Find B_0 … B_K with Σ c_k T_k = Σ_i B_i·T_(i·m).

    From the top, c·T_(i·m + j) = 2c·T_(i·m)·T_j - c·T_(i·m - j) moves every coefficient into its
    group and a remainder into the group below.

    Args:
        coefficients: c_0 … c_degree, degree at least 1.
        num_baby_steps: m.

    Returns:
        The K + 1 groups of m coefficients each, K = ⌊degree/m⌋.

    Examples:
        >>> split_coefficients((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 2)
        ((1.0, 1.0), (1.0, 0.0), (1.0, 2.0), (1.0, 0.0))
    """
    size, rest = num_baby_steps, list(coefficients)
    groups: list[tuple[float, ...]] = []
    for start in range((len(rest) - 1) // size * size, 0, -size):
        upper = rest[start:] + [0.0] * (size + start - len(rest))
        groups.append((upper[0], *(2.0 * c for c in upper[1:])))
        del rest[start:]
        for j, c in enumerate(upper[1:], start=1):
            rest[start - j] -= c
    return (tuple(rest), *reversed(groups))


def _num_baby_steps(config: ChebyshevConfig) -> int:
    return 1 if config.evaluation == "clenshaw" else fewest_baby_steps(config.degree)


def _workspace(config: ChebyshevConfig, root: Fraction) -> int:
    """The recurrence's stacks, beside the polynomial's value; operands that are rounded."""
    return _num_baby_steps(config) + (3 if config.matmul_precision == "fp32" else 7)


SOLVER = Solver(
    solve=chebyshev,
    workspace=_workspace,
    check=check,
    error=lambda config, root: fit_error(float(root), *_fit_of(config)),
)
