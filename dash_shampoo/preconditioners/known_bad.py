"""Combinations of settings that are known to train badly, and are warned of at construction."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dash_shampoo.base import (
    EigenvalueCorrectedShampooPreconditionerConfig,
    PreconditionerConfig,
    QREigendecompositionConfig,
)
from dash_shampoo.config import DashShampooPreconditionerConfig

logger = logging.getLogger(__name__)

# QR's epsilon from which on it was seen to train.
_SAFE_EPSILON = 1e-5
# F is quadratic in G, so with exponents that sum to 1/2 an update doesn't depend on the gradient's scale.
_NEUTRAL_EXPONENT = 0.5


def warn_of_known_bad(
    config: PreconditionerConfig | None, group: Mapping[str, Any], base_list: Any
) -> None:
    """Warns of combinations that are known to explode without grafting.

    Args:
        config: The group's preconditioner config, as the user gave it.
        group: The parameter group.
        base_list: The list that the base has built for it.
    """
    if group["grafting_config"] is not None:
        return
    is_unstable_soap = type(
        config
    ) is EigenvalueCorrectedShampooPreconditionerConfig and isinstance(
        config.amortized_computation_config, QREigendecompositionConfig
    )
    if is_unstable_soap and group["epsilon"] < _SAFE_EPSILON:
        logger.warning(
            "EigenvalueCorrectedShampooPreconditionerConfig with QREigendecompositionConfig is known to "
            "explode without grafting and with an epsilon as small as %g: it sorts its columns anew in "
            "every refresh. Use DashSOAPPreconditionerConfig, eigh, a grafting_config, or an epsilon of "
            "1e-4.",
            group["epsilon"],
        )
    # Only of a config of ours: the base's own users know what they have tuned.
    if type(config) is DashShampooPreconditionerConfig:
        blocks = base_list._local_kronecker_factors_unwrapped
        steepest = max((sum(1 / root for root in block.roots) for block in blocks), default=0.0)
        if steepest > _NEUTRAL_EXPONENT + 1e-6:
            logger.warning(
                "Without grafting, exponents that sum to %g over the dimensions of a block let its "
                "updates grow as its gradients shrink (in proportion to their norm to the power %g). "
                "Give a grafting_config, such as AdamPreconditionerConfig(), or exponents that sum to 1/2.",
                steepest,
                1 - 2 * steepest,
            )
