"""Orthogonalisation by Newton-Schulz: the base's in the gradient's dtype, and Muon's in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_shampoo.base import NewtonSchulzOrthogonalizationConfig
from dash_shampoo.inverse_root.fields import check_one_of
from dash_shampoo.orthogonalization.odd_polynomials import iterate_quintics, normalized
from dash_shampoo.orthogonalization.scales import match_rms_adamw

# The base's: what is shorter comes out shorter.
_SMALLEST_NORM = 1e-8
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(kw_only=True)
class MuonOrthogonalizationConfig(NewtonSchulzOrthogonalizationConfig):
    """Newton-Schulz as Muon does it: five steps in bf16, and an update as long as AdamW's.

    Unlike the base's, it does not depend on the scale of the gradient.

    Choose this for the price of Muon; with float32 gradients it is two to ten times faster than the
    base's, which iterates in their dtype.

    Attributes:
        scale_by_dims_fn (Callable): Factor of the update, by columns and rows.
            (Default: match_rms_adamw)
        compute_dtype (torch.dtype): The dtype of the iteration. (Default: torch.bfloat16)
    """

    scale_by_dims_fn: Callable[[int, int], float] = match_rms_adamw
    compute_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_one_of(self, "compute_dtype", COMPUTE_DTYPES)


def newton_schulz(G: Tensor, config: NewtonSchulzOrthogonalizationConfig) -> Tensor:
    """X₀ = G/‖G‖_F; X ← aX + bX(XᵀX) + cX(XᵀX)², a fixed number of times.

    With the default coefficients, Muon's, singular values above about 2e-3 of the norm end up
    between 0.7 and 1.2; smaller ones are multiplied by 485. Coefficients with a + b + c = 1
    converge to 1.

    Args:
        G: (K, M, N) stack.
        config: `num_iterations`, `coefficients`, and the dtype of the iteration where the config
            has one; else it is that of G.

    Returns:
        (K, M, N) in the dtype of the iteration. Zeros for a G of zeros.

    Note:
        For M×N with M ≥ N in each step two products of 2·M·N² flops, one symmetric, and one of
        2·N³, symmetric: 15 products for square matrices. No host sync.

    References:
        Jordan et al., Muon, 2024; Bernstein and Newhouse, arXiv 2409.20325.

    Examples:
        >>> G = torch.diag(torch.tensor([2.0, 1.0]))[None]
        >>> config = NewtonSchulzOrthogonalizationConfig(num_iterations=15, coefficients=(1.5, -0.5, 0))
        >>> torch.allclose(newton_schulz(G, config)[0], torch.eye(2))
        True
    """
    if isinstance(config, MuonOrthogonalizationConfig):
        X = normalized(G).to(config.compute_dtype)
    else:
        X = normalized(G, _SMALLEST_NORM)
    return iterate_quintics(X, [config.coefficients] * config.num_iterations)
