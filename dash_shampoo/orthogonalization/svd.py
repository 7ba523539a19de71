"""Orthogonalisation by a singular value decomposition: exact and slow."""

from __future__ import annotations

import torch
from torch import Tensor

from dash_shampoo.base import SVDOrthogonalizationConfig


def svd(G: Tensor, config: SVDOrthogonalizationConfig) -> Tensor:
    """U·Vᵀ of the reduced decomposition G = U·diag(σ)·Vᵀ, with `scale_by_nuclear_norm` times Σσ.

    Args:
        G: (K, M, N) stack, finite. Half precision is decomposed in float32.
        config: `scale_by_nuclear_norm`.

    Returns:
        (K, M, N), in the dtype of the decomposition.

    Note:
        A loop over the matrices, on a GPU with host syncs; 1 product.
    """
    wide = G if G.dtype in (torch.float32, torch.float64) else G.float()
    U, singular_values, Vt = torch.linalg.svd(wide, full_matrices=False)
    result = torch.bmm(U, Vt)
    if config.scale_by_nuclear_norm:
        result *= singular_values.sum(-1)[:, None, None]
    return result
