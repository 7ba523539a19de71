"""The one entry to all orthogonalisations: checks, dispatch by config, bad blocks, the scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import (
    NewtonSchulzOrthogonalizationConfig,
    OrthogonalizationConfig,
    SVDOrthogonalizationConfig,
)
from dash_shampoo.inverse_root.blocks import finite_blocks, is_known_to_be, per_block
from dash_shampoo.inverse_root.registry import of_class
from dash_shampoo.orthogonalization.gram import GramOrthogonalizationConfig, gram
from dash_shampoo.orthogonalization.minimax_polar import MinimaxPolarConfig, minimax_polar
from dash_shampoo.orthogonalization.newton_schulz import newton_schulz
from dash_shampoo.orthogonalization.svd import svd
from dash_shampoo.products import plain_products

_METHODS: dict[type[OrthogonalizationConfig], Callable[[Tensor, Any], Tensor]] = {
    SVDOrthogonalizationConfig: svd,
    NewtonSchulzOrthogonalizationConfig: newton_schulz,
    MinimaxPolarConfig: minimax_polar,
    GramOrthogonalizationConfig: gram,
}


def check_orthogonalization_supported(config: OrthogonalizationConfig) -> None:
    """Refuse a config that no method takes.

    Args:
        config: How matrices are orthogonalised.

    Raises:
        ValueError: If there is no method for it.

    Examples:
        >>> check_orthogonalization_supported(SVDOrthogonalizationConfig())
    """
    of_class(_METHODS, config, "orthogonalisation")


def orthogonalize(G: Tensor, config: OrthogonalizationConfig) -> Tensor:
    """scale·U·Vᵀ of each matrix G = U·diag(σ)·Vᵀ of a stack, by the method of the config.

    Args:
        G: (K, M, N) stack, of any floating dtype. Not modified.
        config: The method, and `scale_by_dims_fn` of (N, M), the columns and rows.

    Returns:
        (K, M, N) in the dtype of G; NaN for a matrix that holds NaN or infinity, which leaves the
        others as they are.

    Raises:
        ValueError: If G is not such a stack, or no method takes the config.

    Note:
        The methods' docstrings have their costs.

    Examples:
        >>> G = torch.diag(torch.tensor([3.0, 1.0])).expand(4, 2, 2)
        >>> orthogonalize(G, SVDOrthogonalizationConfig())[0].abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    method = of_class(_METHODS, config, "orthogonalisation")
    if G.ndim != 3 or not G.dtype.is_floating_point:
        raise ValueError(
            f"G must be a stack (K, M, N) of a floating dtype, not {tuple(G.shape)} of {G.dtype}."
        )
    scale = config.scale_by_dims_fn(G.shape[2], G.shape[1])
    if G.numel() == 0:
        return G.clone()
    clean = G.detach()
    is_finite = finite_blocks(clean)
    is_clean = is_known_to_be(True, is_finite)
    if not is_clean:
        clean = torch.where(per_block(is_finite), clean, 0.0)
    with plain_products(G.device, min(G.shape[1:]) ** 3):
        result = method(clean, config)
    if scale != 1.0:
        result = result * scale
    if not is_clean:
        result = result.masked_fill(per_block(~is_finite), torch.nan)
    return result.to(G.dtype)
