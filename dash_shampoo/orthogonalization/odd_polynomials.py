"""X ← aX + b(XXᵀ)X + c(XXᵀ)²X, the step that all odd polynomial iterations share.

Shape suffixes: X_KMN is a stack of K matrices of M×N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.inverse_root.blocks import frobenius_norm, per_block

Quintic = tuple[float, float, float]


def normalized(G: Tensor, smallest_norm: float | None = None) -> Tensor:
    """G/max(‖G‖_F, smallest_norm) of each matrix, so that no singular value is above 1.

    Without a smallest norm, in float32 at least and whatever the scale of G: squares of tiny or huge
    entries would leave the range of the dtype.
    """
    if smallest_norm is not None:
        norm: Tensor = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
        return G / norm.clamp_min(smallest_norm)
    G = G if G.dtype == torch.float64 else G.float()
    inverse = frobenius_norm(G).reciprocal_().clamp_max_(torch.finfo(G.dtype).max)
    return G * per_block(inverse.to(G.dtype))


def iterate_quintics(X: Tensor, quintics: Sequence[Quintic]) -> Tensor:
    """Apply odd polynomials of degree 5 to the singular values, one after the other.

    Args:
        X: (K, M, N), singular values of at most about 1.
        quintics: (a, b, c) of each step's p(x) = ax + bx³ + cx⁵.

    Returns:
        (K, M, N).

    Note:
        For each step 2 products of the large with the small dimension, one of them symmetric, and
        1 symmetric one of the small dimension with itself.
    """
    is_tall = X.shape[-2] > X.shape[-1]
    X_KMN = X.mT if is_tall else X
    for a, b, c in quintics:
        B_KMM = torch.bmm(X_KMN, X_KMN.mT)  # of rows, which lie in memory one after the other
        B_KMM = torch.baddbmm(B_KMM, B_KMM, B_KMM, beta=b, alpha=c)
        X_KMN = torch.baddbmm(X_KMN, B_KMM, X_KMN, beta=a)
    return X_KMN.mT if is_tall else X_KMN
