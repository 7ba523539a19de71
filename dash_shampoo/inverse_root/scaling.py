"""The scale s of each block, so that the eigenvalues of A/s lie in (0, 1] or slightly above.

Shape suffixes: A_BNN is a stack of B blocks of N×N; V_BNK are K start vectors; s_B one scale each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from dash_shampoo.inverse_root.blocks import (
    constants,
    diagonal,
    frobenius_norm,
    max_abs,
    per_block,
)
from dash_shampoo.inverse_root.fields import (
    check_choice,
    check_field,
    check_positive_int,
    is_number,
)
from dash_shampoo.products import MatmulPrecision, Products

_START_VECTOR_SEED = 2602_02016


@dataclass(init=False, frozen=True)
class ScalingConfig(ABC):
    """How a solver finds s, by which it divides A so that the spectrum of A/s is at most about 1.

    Abstract: use one of its subclasses.
    """

    @abstractmethod
    def __init__(self) -> None: ...


@dataclass(kw_only=True, frozen=True)
class FrobeniusScaling(ScalingConfig):
    """s = ‖A‖_F, a certified upper bound of λ_max, up to √N above it.

    Choose this when in doubt: it costs no matmul and no iteration can leave its region of
    convergence.
    """


@dataclass(kw_only=True, frozen=True)
class PowerIterationScaling(ScalingConfig):
    """s = safety_factor × the largest Rayleigh quotient after a few power iterations.

    Choose this when the spectrum is flat, so that ‖A‖_F is far above λ_max and costs steps. It is
    an estimate, not a bound: an unlucky start vector can miss the largest eigenvalue by more than
    the safety factor. The start vectors are fixed (own generator), so replicas agree.

    Attributes:
        num_iterations (int): Power iterations, at least 1. (Default: 10)
        num_vectors (int): Start vectors that are iterated at once; the paper uses 1 or 16.
            (Default: 1)
        safety_factor (float): Factor on the estimate, at least 1. (Default: 2.0)
        matmul_precision (MatmulPrecision): Precision of the products A·V; the paper uses bf16.
            (Default: "fp32")
    """

    num_iterations: int = 10
    num_vectors: int = 1
    safety_factor: float = 2.0
    matmul_precision: MatmulPrecision = "fp32"

    def __post_init__(self) -> None:
        check_positive_int(self, "num_iterations")
        check_positive_int(self, "num_vectors")
        is_factor = is_number(self.safety_factor) and self.safety_factor >= 1.0
        check_field(self, "safety_factor", is_factor, "in [1, inf)")
        check_choice(self, "matmul_precision", MatmulPrecision)


@dataclass(kw_only=True, frozen=True)
class TraceScaling(ScalingConfig):
    """s = a certified upper bound of λ_max from the traces of A, A² and A⁴, for one product.

        s = min( m₁/n + √((n-1)/n·(m₂ - m₁²/n)),  √( m₂/n + √((n-1)/n·(m₄ - m₂²/n)) ) )

    with m_i = tr Aⁱ. On factor matrices of real trainings it is within 0.1 % of λ_max in the median
    and never below; the worst case, a spectrum of two equal parts, is a factor of about 2.3. Choose
    this for a solver that wants a tight bound without iterations; `MinimaxConfig` has it built in,
    and there it shares its one product with the solver.
    """


@dataclass(kw_only=True)
class ScaledConfig:
    """What the configs of solvers that divide A by such an s have in common.

    Attributes:
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    scaling: ScalingConfig = field(default_factory=FrobeniusScaling)
    matmul_precision: MatmulPrecision = "fp32"

    def __post_init__(self) -> None:
        check_field(self, "scaling", isinstance(self.scaling, ScalingConfig), "a ScalingConfig")
        check_choice(self, "matmul_precision", MatmulPrecision)


def compute_scale(A_BNN: Tensor, config: ScalingConfig, epsilon: float = 0.0) -> Tensor:
    """Find s with λ_max((A + epsilon·I)/s) at most about 1 for each block; 1 for a block of zeros.

    Args:
        A_BNN: (B, N, N) symmetric positive semi-definite stack.
        config: Which scale, and its options.
        epsilon: Damping, at least 0.

    Returns:
        (B,) float64 positive scales, NaN where A is not finite.

    Raises:
        ValueError: If the scaling is not one of those known here.

    Note:
        No host sync, and the global random generator is left alone.

    Examples:
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))[None]
        >>> compute_scale(A, FrobeniusScaling()).tolist()
        [5.0]
    """
    match config:
        case FrobeniusScaling():
            s_B = damped_frobenius_norm(A_BNN, epsilon)
        case PowerIterationScaling():
            s_B = (multi_power_iteration(A_BNN, config).double() + epsilon) * config.safety_factor
        case TraceScaling():
            norm_B = frobenius_norm(A_BNN).clamp_min(torch.finfo(A_BNN.dtype).tiny)
            A_scaled = A_BNN * per_block(norm_B.reciprocal().to(A_BNN.dtype))
            A_squared = Products("fp32").square(A_scaled)
            trace_B = diagonal(A_BNN).sum(-1, dtype=torch.float64)
            s_B = trace_bound(trace_B, norm_B.reciprocal(), A_squared) * norm_B + epsilon
        case _:
            raise ValueError(f"No scaling is known for {type(config).__name__}.")
    # Below the smallest normal number 1/s overflows; such a block is a block of zeros.
    s_B = torch.threshold(s_B, torch.finfo(A_BNN.dtype).tiny, 1.0)
    return s_B.nan_to_num_(nan=torch.nan, posinf=torch.nan)


def damped_frobenius_norm(A_BNN: Tensor, epsilon: float) -> Tensor:
    """(B,) float64 ‖A + epsilon·I‖_F, from ‖A‖_F and the trace."""
    norm_B = frobenius_norm(A_BNN)
    if epsilon == 0.0:
        return norm_B
    trace_B = diagonal(A_BNN).sum(-1, dtype=torch.float64)
    constant = constants((A_BNN.shape[-1] * epsilon**2,), norm_B.dtype, norm_B.device)
    return torch.addcmul(constant, norm_B, norm_B).add_(trace_B, alpha=2.0 * epsilon).sqrt_()


def multi_power_iteration(A_BNN: Tensor, config: PowerIterationScaling) -> Tensor:
    """Estimate λ_max as the largest Rayleigh quotient vᵀAv / vᵀv of iterated start vectors.

        V ← A V, each column normalised, `num_iterations` times;  λ ≈ max_k v_kᵀ A v_k

    Each quotient is at most λ_max (in exact arithmetic), so this is an estimate from below. It is
    low where every start vector is nearly orthogonal to the leading eigenvector, or where the
    leading eigenvalues lie close together (then it is low by their distance only).

    Args:
        A_BNN: (B, N, N) finite symmetric positive semi-definite stack.
        config: Number of iterations and vectors, precision of the products.

    Returns:
        (B,) estimates, at least 0, not yet multiplied by the safety factor.

    Note:
        (num_iterations + 1)·K/N matmuls for K vectors. No host sync.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.2.1; the scaling of DASH
        (arXiv 2602.02016) with one vector or sixteen.
    """
    multiply = Products(config.matmul_precision)
    # Entries of at most 1, so that fp16 operands and the norms of V can't overflow.
    largest_B = max_abs(A_BNN)
    tiny = torch.finfo(A_BNN.dtype).tiny
    scaled = multiply.round(A_BNN / per_block(largest_B.clamp_min(tiny)))
    V = _start_vectors(A_BNN.shape[-1], config.num_vectors, A_BNN.dtype, A_BNN.device)
    V_BNK = V.expand(A_BNN.shape[0], -1, -1)
    for _ in range(config.num_iterations):
        V_BNK = multiply(scaled, V_BNK)
        V_BNK = V_BNK / torch.linalg.vector_norm(V_BNK, dim=1, keepdim=True).clamp_min(tiny)
    quotients_BK: Tensor = (V_BNK * multiply(scaled, V_BNK)).sum(dim=1)
    return quotients_BK.amax(dim=-1).clamp_min(0.0) * largest_B


def trace_bound(
    trace_B: Tensor, factor_B: Tensor, A_squared_BNN: Tensor, norms_BP: Tensor | None = None
) -> Tensor:
    """Bound λ_max from above by the traces of A, A² and A⁴ = ‖A²‖²_F.

        min( m₁/n + √((n-1)/n·(m₂ - m₁²/n)),  √( m₂/n + √((n-1)/n·(m₄ - m₂²/n)) ) )

    The first is the largest that one eigenvalue can be when the mean and the variance of all are
    known; the second is the same for the squares of the eigenvalues. The variances are raised by
    the rounding errors of the traces, so that the bound holds for what the computer computes.

    Args:
        trace_B: (B,) float64, of a symmetric stack.
        factor_B: (B,) which gives A, whose entries are about 1 or smaller, from that stack.
        A_squared_BNN: (B, N, N) its squares, as computed.
        norms_BP: (B, P) numbers, of which those of a block add up to ‖A²‖²_F. Default: a pass over the
            squares.

    Returns:
        (B,) float64 bounds, at least 0.

    References:
        Wolkowicz and Styan, Linear Algebra and its Applications 29 (1980), theorem 2.1.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 1.0, 4.0]))[None]
        >>> round(trace_bound(torch.tensor([6.0]).double(), torch.ones(1), A @ A).item(), 3)
        4.0
    """
    n = A_squared_BNN.shape[-1]
    m_3B = trace_B.new_empty(3, trace_B.shape[0])
    torch.mul(trace_B, factor_B, out=m_3B[0])
    torch.sum(diagonal(A_squared_BNN), -1, dtype=torch.float64, out=m_3B[1])
    if norms_BP is None:
        norm_B = torch.linalg.vector_norm(A_squared_BNN.flatten(1), dim=1)
        torch.mul(norm_B, norm_B.double(), out=m_3B[2])
    else:
        torch.sum(norms_BP, -1, dtype=torch.float64, out=m_3B[2])
    sums_2B, squares_2B = m_3B[:2], m_3B[1:]
    means_2B = sums_2B / n
    variances_2B = torch.addcmul(squares_2B, sums_2B, means_2B, value=-1.0).clamp_min_(0.0)
    variances_2B.add_(squares_2B, alpha=16.0 * torch.finfo(A_squared_BNN.dtype).eps)
    bounds_2B = variances_2B.mul_((n - 1) / n).sqrt_().add_(means_2B).clamp_min_(0.0)
    return torch.minimum(bounds_2B[0], bounds_2B[1].sqrt())


@cache
def _start_vectors(size: int, num_vectors: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, K) unit start vectors, the same on every rank: from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(_START_VECTOR_SEED)
    V: Tensor = torch.randn(
        size, num_vectors, generator=generator, dtype=torch.float64, device="cpu"
    )
    V /= torch.linalg.vector_norm(V, dim=0)
    return V.to(dtype=dtype, device=device)
