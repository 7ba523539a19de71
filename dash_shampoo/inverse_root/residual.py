"""A cheap test of an inverse root: apply it and the matrix to a few fixed vectors.

Shape suffixes: A_BNN is a stack of B blocks of N×N; V_BKN holds K rows for each.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from dash_shampoo.products import Products

NUM_VECTORS = 4
_MAX_APPLICATIONS = 32
# Rounding may raise the error of an eigenvalue by this share of what the solver promises.
_ROUNDING = 0.05


def sketch_of(X: Tensor) -> Tensor:
    """V X, (B, 4, N): not finite where X is not, or its entries near the largest number of their dtype."""
    V = fixed_rows(X.shape[-1], X.dtype, X.device)
    return Products("fp32")(V.expand(X.shape[0], -1, -1), X)


def sketched_residual(
    A: Tensor,
    X: Tensor,
    root: Fraction,
    damping: Tensor | float,
    sketch: Tensor | None = None,
    divisor: float | Tensor = 1.0,
) -> Tensor:
    """‖V X^⌈p/2⌉ (A + damping·I)^q X^⌊p/2⌋ - V‖_F / ‖V‖_F for the root p/q and four rows V.

    It is 0 for X = (A + damping·I)^(-q/p), and at most (1 + E)^p - 1 for a root whose eigenvalues are
    within E of that. A residual above 0.3 caught every root that was off by more than 25 % in the study
    of the project's benchmarks; it cannot see a wrong sign of an eigenvalue of X where p is even.

    Args:
        A: (B, N, N) stack.
        X: (B, N, N) its inverse roots, to be tested.
        root: p/q.
        damping: (B,), or one number, what X was meant to have added to the diagonal.
        sketch: V X, where it is known.
        divisor: A/divisor is meant with A.

    Returns:
        (B,) residuals. NaN, which is to be read as unknown, for a root with p + q above 32; infinite
        where X is not finite, or so large that its products overflow.

    Note:
        (p + q)·4/N of a batched matmul, in the dtype of A; no host sync. The vectors are the same for
        every block and on every process, and drawn without the global generator. They are rows, since
        the CPU multiplies those four times faster than columns.

    References:
        Randomised estimation of a norm: Halko, Martinsson and Tropp, SIAM Review 53 (2011),
        section 4.3.

    Examples:
        >>> A = 4.0 * torch.eye(3).expand(2, 3, 3)
        >>> right, wrong = 0.5 * torch.eye(3), torch.eye(3)
        >>> residual = sketched_residual(A, torch.stack((right, wrong)), Fraction(2), torch.zeros(2))
        >>> [round(r, 6) for r in residual.tolist()]
        [0.0, 3.0]
    """
    num_roots, num_matrices = root.numerator, root.denominator
    if num_roots + num_matrices > _MAX_APPLICATIONS:
        return torch.full_like(A[:, 0, 0], torch.nan)
    # In TF32, which the program may allow, the residual of a right root is 2 and more.
    multiply = Products("fp32")
    V = fixed_rows(A.shape[-1], A.dtype, A.device)
    result = sketch_of(X) if sketch is None else sketch
    # Half of the roots on either side, so that the products stay near the size of V.
    for _ in range((num_roots - 1) // 2):
        result = multiply(result, X)
    for _ in range(num_matrices):
        if isinstance(divisor, Tensor):
            product = multiply(result, A).div_(divisor)
        else:
            product = multiply(result, A, alpha=1.0 / divisor)
        if isinstance(damping, Tensor):
            result = product.addcmul_(result, damping[:, None, None])
        else:
            result = product.add_(result, alpha=damping)
    for _ in range(num_roots // 2):
        result = multiply(result, X)
    residual: Tensor = torch.linalg.vector_norm((result - V).flatten(1), dim=1)
    residual /= float(A.shape[-1] * NUM_VECTORS) ** 0.5
    return residual.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def norm_from_below(S: Tensor, num_steps: int = 2) -> Tensor:
    """‖S‖₂ of each symmetric block, estimated from below by power steps from four fixed rows.

    Args:
        S: (B, N, N) stack.
        num_steps: Power steps. Default: 2.

    Returns:
        (B,) estimates.

    Note:
        4/N of a product a step; no host sync.

    Examples:
        >>> norm_from_below(torch.diag(torch.tensor([4.0, 1.0]))[None]).round(decimals=1)
        tensor([3.9000])
    """
    tiny = torch.finfo(S.dtype).tiny
    V = torch.bmm(fixed_rows(S.shape[-1], S.dtype, S.device).expand(S.shape[0], -1, -1), S)
    for _ in range(num_steps - 1):
        V = V / torch.linalg.vector_norm(V, dim=-1, keepdim=True).clamp_min(tiny)
        V = torch.bmm(V, S)
    lengths: Tensor = torch.linalg.vector_norm(V, dim=-1)
    return lengths.amax(-1)


def residual_bound(threshold: float, error: float, root: Fraction) -> float:
    """The residual above which a root is not what its solver promises.

    Args:
        threshold: Of a solver that promises the exact root.
        error: E, the largest relative error of an eigenvalue that the solver promises.
        root: p/q.

    Returns:
        max(threshold, (1 + 1.05·E)^p - 1): a root within E is never above it.

    Examples:
        >>> residual_bound(0.3, 0.0, Fraction(4)), round(residual_bound(0.3, 0.6, Fraction(2)), 3)
        (0.3, 1.657)
    """
    return max(threshold, (1.0 + (1.0 + _ROUNDING) * error) ** root.numerator - 1.0)


@cache
def fixed_rows(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(K, N) entries ±1, which hit every eigenvector alike, from a generator of their own: replicas agree."""
    generator = torch.Generator("cpu").manual_seed(size)
    signs = torch.randint(0, 2, (NUM_VECTORS, size), generator=generator, device="cpu")
    return (2 * signs - 1).to(device=device, dtype=dtype)
