"""The nearest orthogonal matrix for each of a stack, by one function and a config."""

from dash_shampoo.orthogonalization.dispatch import check_orthogonalization_supported, orthogonalize
from dash_shampoo.orthogonalization.gram import GramOrthogonalizationConfig
from dash_shampoo.orthogonalization.minimax_polar import MinimaxPolarConfig
from dash_shampoo.orthogonalization.newton_schulz import MuonOrthogonalizationConfig
from dash_shampoo.orthogonalization.scales import match_rms_adamw, muon_original

__all__ = [
    "GramOrthogonalizationConfig",
    "MinimaxPolarConfig",
    "MuonOrthogonalizationConfig",
    "check_orthogonalization_supported",
    "match_rms_adamw",
    "muon_original",
    "orthogonalize",
]
