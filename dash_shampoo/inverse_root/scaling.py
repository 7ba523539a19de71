"""The scale s of each block, so that the eigenvalues of A/s lie in (0, 1] or slightly above.

Shape suffixes: A_BNN is a stack of B blocks of N×N; V_BNK are K start vectors; s_B one scale each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dash_shampoo.config import (
    FrobeniusScaling,
    PowerIterationScaling,
    ScalingConfig,
    TraceScaling,
)
from dash_shampoo.inverse_root.blocks import diagonal, frobenius_norm, max_abs, per_block
from dash_shampoo.inverse_root.matmul import Matmul, MatmulCounter

_START_VECTOR_SEED = 2602_02016


def compute_scale(A_BNN: Tensor, config: ScalingConfig, counter: MatmulCounter) -> Tensor:
    """Find s with λ_max(A/s) at most about 1 for each block; 1 for a block of zeros.

    Args:
        A_BNN: (B, N, N) finite symmetric positive semi-definite stack.
        config: Which scale, and its options.
        counter: Counts the products of the power iteration, or the one of the traces.

    Returns:
        (B,) positive scales in the dtype of `A_BNN`.

    Raises:
        ValueError: If the scaling is not one of those known here.

    Note:
        No host sync, and the global random generator is left alone.

    Examples:
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))[None]
        >>> compute_scale(A, FrobeniusScaling(), MatmulCounter(1)).tolist()
        [5.0]
    """
    match config:
        case FrobeniusScaling():
            s_B = frobenius_norm(A_BNN)
        case PowerIterationScaling():
            s_B = multi_power_iteration(A_BNN, config, counter) * config.safety_factor
        case TraceScaling():
            norm_B = frobenius_norm(A_BNN).clamp_min(torch.finfo(A_BNN.dtype).tiny)
            A_scaled = A_BNN / per_block(norm_B)
            A_squared = Matmul("fp32", counter)(A_scaled, A_scaled, is_symmetric=True)
            s_B = trace_bound(A_scaled, A_squared).to(A_BNN.dtype) * norm_B
        case _:
            raise ValueError(f"No scaling is known for {type(config).__name__}.")
    # Below the smallest normal number 1/s overflows; such a block is a block of zeros.
    return torch.where(s_B > torch.finfo(s_B.dtype).tiny, s_B, torch.ones_like(s_B))


def multi_power_iteration(
    A_BNN: Tensor, config: PowerIterationScaling, counter: MatmulCounter
) -> Tensor:
    """Estimate λ_max as the largest Rayleigh quotient vᵀAv / vᵀv of iterated start vectors.

        V ← A V, each column normalised, `num_iterations` times;  λ ≈ max_k v_kᵀ A v_k

    Each quotient is at most λ_max (in exact arithmetic), so this is an estimate from below. It is
    low where every start vector is nearly orthogonal to the leading eigenvector, or where the
    leading eigenvalues lie close together (then it is low by their distance only).

    Args:
        A_BNN: (B, N, N) finite symmetric positive semi-definite stack.
        config: Number of iterations and vectors, precision of the products.
        counter: Counts the products, K/N each.

    Returns:
        (B,) estimates, at least 0, not yet multiplied by the safety factor.

    Note:
        (num_iterations + 1)·K/N matmuls for K vectors. No host sync.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.2.1; the scaling of DASH
        (arXiv 2602.02016) with one vector or sixteen.
    """
    matmul = Matmul(config.matmul_precision, counter)
    # Entries of at most 1, so that fp16 operands and the norms of V can't overflow.
    largest_B = max_abs(A_BNN)
    tiny = torch.finfo(A_BNN.dtype).tiny
    scaled = matmul.round(A_BNN / per_block(largest_B.clamp_min(tiny)))
    V = _start_vectors(A_BNN.shape[-1], config.num_vectors, A_BNN.dtype, A_BNN.device)
    V_BNK = V.expand(A_BNN.shape[0], -1, -1)
    for _ in range(config.num_iterations):
        V_BNK = matmul(scaled, V_BNK)
        V_BNK = V_BNK / torch.linalg.vector_norm(V_BNK, dim=1, keepdim=True).clamp_min(tiny)
    quotients_BK: Tensor = (V_BNK * matmul(scaled, V_BNK)).sum(dim=1)
    return quotients_BK.amax(dim=-1).clamp_min(0.0) * largest_B


def trace_bound(A_BNN: Tensor, A_squared_BNN: Tensor) -> Tensor:
    """Bound λ_max from above by the traces of A, A² and A⁴ = ‖A²‖²_F.

        min( m₁/n + √((n-1)/n·(m₂ - m₁²/n)),  √( m₂/n + √((n-1)/n·(m₄ - m₂²/n)) ) )

    The first is the largest that one eigenvalue can be when the mean and the variance of all are
    known; the second is the same for the squares of the eigenvalues. The variances are raised by
    the rounding errors of the traces, so that the bound holds for what the computer computes.

    Args:
        A_BNN: (B, N, N) symmetric stack whose entries are about 1 or smaller.
        A_squared_BNN: (B, N, N) its squares, as computed.

    Returns:
        (B,) float64 bounds, at least 0.

    References:
        Wolkowicz and Styan, Linear Algebra and its Applications 29 (1980), theorem 2.1.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 1.0, 4.0]))[None]
        >>> round(trace_bound(A, A @ A).item(), 3)
        4.0
    """
    n = A_BNN.shape[-1]
    m1_B = diagonal(A_BNN).sum(-1, dtype=torch.float64)
    m2_B = diagonal(A_squared_BNN).sum(-1, dtype=torch.float64)
    m4_B = torch.linalg.vector_norm(A_squared_BNN.flatten(1), dim=1).double().square_()
    sums_2B, squares_2B = torch.stack((m1_B, m2_B, m4_B)).unfold(0, 2, 1).unbind(-1)
    means_2B = sums_2B / n
    variances_2B = torch.addcmul(squares_2B, sums_2B, means_2B, value=-1.0).clamp_min_(0.0)
    variances_2B.add_(squares_2B, alpha=16.0 * torch.finfo(A_BNN.dtype).eps)
    bounds_2B = variances_2B.mul_((n - 1) / n).sqrt_().add_(means_2B).clamp_min_(0.0)
    return torch.minimum(bounds_2B[0], bounds_2B[1].sqrt())


@lru_cache(maxsize=32)
def _start_vectors(size: int, num_vectors: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, K) unit start vectors, the same on every rank: from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(_START_VECTOR_SEED)
    V: Tensor = torch.randn(
        size, num_vectors, generator=generator, dtype=torch.float64, device="cpu"
    )
    V /= torch.linalg.vector_norm(V, dim=0)
    return V.to(dtype=dtype, device=device)
