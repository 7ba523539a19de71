"""Orthogonalisation by an inverse square root of the Gram matrix: products of the small dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dash_shampoo.base import OrthogonalizationConfig, RootInvConfig
from dash_shampoo.inverse_root import MinimaxConfig, check_supported, inverse_root
from dash_shampoo.orthogonalization.scales import match_rms_adamw


@dataclass(kw_only=True)
class GramOrthogonalizationConfig(OrthogonalizationConfig):
    """G·(GᵀG)^(-1/2) by any of the inverse-root solvers; with `MinimaxConfig` by squares alone.

    Choose this where one dimension is much larger than the other, or symmetric products are cheap:
    the large dimension takes part in 2 products only, and the steps between are squares of the
    small one. It is spectral descent as one-sided Shampoo without a memory, so the solver's damping
    is the square of the singular value from which on the result is orthogonal.

    Attributes:
        root_inv_config (RootInvConfig): The solver of the inverse square root.
            (Default: MinimaxConfig())
        scale_by_dims_fn (Callable): Factor of the update, by columns and rows.
            (Default: match_rms_adamw)
    """

    root_inv_config: RootInvConfig = field(default_factory=MinimaxConfig)
    scale_by_dims_fn: Callable[[int, int], float] = match_rms_adamw

    def __post_init__(self) -> None:
        check_supported(self.root_inv_config, 2)


def gram(G: Tensor, config: GramOrthogonalizationConfig) -> Tensor:
    """G·(GᵀG)^(-1/2), or (GGᵀ)^(-1/2)·G where G is wide.

    Args:
        G: (K, M, N) stack. The Gram matrix is taken in float32 (float64 for float64).
        config: The solver.

    Returns:
        (K, M, N), float32 or float64. Zeros where the solver failed, and for a G of zeros.

    Note:
        2 products of the large with the small dimension (one symmetric), and the solver's.
        `MinimaxConfig` needs 4 to 12 symmetric ones and no host sync.

    References:
        Higham, Functions of Matrices, chapter 8 (the polar decomposition).
    """
    G = G if G.dtype == torch.float64 else G.float()
    X = G.mT if G.shape[-2] < G.shape[-1] else G
    # Entries of size 1: squares of tiny or huge gradients would leave float32's range.
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / largest.clamp_min(torch.finfo(X.dtype).tiny)
    result = inverse_root(torch.bmm(X.mT, X), 2, config.root_inv_config)
    root = torch.where(result.is_usable[:, None, None], result.value, 0.0)
    orthogonal = torch.bmm(X, root)
    return orthogonal.mT if G.shape[-2] < G.shape[-1] else orthogonal
