"""Which list serves a config: a stacked one where we have it and the base's list has what it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from dash_shampoo import base
from dash_shampoo.base import (
    EigendecomposedKLShampooPreconditionerConfig,
    EigendecomposedShampooPreconditionerConfig,
    EigenvalueCorrectedShampooPreconditionerConfig,
    PreconditionerConfig,
    QREigendecompositionConfig,
    RootInvKLShampooPreconditionerConfig,
    RootInvShampooPreconditionerConfig,
    SignDescentPreconditionerConfig,
    SpectralDescentPreconditionerConfig,
)
from dash_shampoo.config import DashShampooPreconditionerConfig, base_class_of
from dash_shampoo.preconditioners.eigendecomposed import (
    StackedEigendecomposedShampooPreconditionerList,
)
from dash_shampoo.preconditioners.eigenvalue_corrected import (
    StackedEigenvalueCorrectedShampooPreconditionerList,
)
from dash_shampoo.preconditioners.root_inverse import StackedRootInvShampooPreconditionerList
from dash_shampoo.preconditioners.seams import explanation_of, missing_seam
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.preconditioners.stateless import (
    StackedSignDescentPreconditionerList,
    StackedSpectralDescentPreconditionerList,
)

logger = logging.getLogger(__name__)

# By exact type: a subclass in the base is another method.
STACKED_LISTS: dict[type, type[StackedPreconditionerList]] = {
    RootInvShampooPreconditionerConfig: StackedRootInvShampooPreconditionerList,
    RootInvKLShampooPreconditionerConfig: StackedRootInvShampooPreconditionerList,
    EigendecomposedShampooPreconditionerConfig: StackedEigendecomposedShampooPreconditionerList,
    EigendecomposedKLShampooPreconditionerConfig: StackedEigendecomposedShampooPreconditionerList,
    EigenvalueCorrectedShampooPreconditionerConfig: (
        StackedEigenvalueCorrectedShampooPreconditionerList
    ),
    SpectralDescentPreconditionerConfig: StackedSpectralDescentPreconditionerList,
    SignDescentPreconditionerConfig: StackedSignDescentPreconditionerList,
}
# QR's epsilon from which on it was seen to train.
_SAFE_EPSILON = 1e-5
# F is quadratic in G, so with exponents that sum to 1/2 an update doesn't depend on the gradient's scale.
_NEUTRAL_EXPONENT = 0.5


def preconditioner_list(
    config: PreconditionerConfig | None,
    group: Mapping[str, Any],
    make_base_list: Callable[[PreconditionerConfig | None], Any],
    **adopted: Any,
) -> Any:
    """The list for a config of a group: stacked where the config is known, else the base's own.

    Args:
        config: Of the preconditioner or of the grafting.
        group: The parameter group.
        make_base_list: Gives the base's list for a config of the base.
        **adopted: As of `StackedPreconditionerList.adopt`.

    Returns:
        The list.

    Raises:
        RuntimeError: If the base's list lacks what the stacked one needs, and can't do the method itself.
        ValueError: If the method is not known, or cannot compute what the list needs.
    """
    stacked_list = STACKED_LISTS.get(base_class_of(config))
    if stacked_list is None:
        if config is group["preconditioner_config"]:
            logger.info(
                "%s has no factor matrices, or is not known: it runs on the base's own list.",
                type(config).__name__,
            )
        return make_base_list(config)
    method = getattr(config, stacked_list.method_name, None)
    # The base swallows an unknown method as a failed computation, so it must be refused here.
    stacked_list.check_method(method)
    base_list = make_base_list(config_for_base(config))
    if seam := missing_seam(base_list, stacked_list.block_seams, stacked_list.list_seams):
        explanation = explanation_of(seam)
        name = type(method).__name__
        if method is not None and getattr(base, name, None) is not type(method):
            raise RuntimeError(
                f"{explanation} The base itself cannot compute {name}; use that commit, or set "
                "DASH_SHAMPOO_BASE=embedded."
            )
        logger.warning("%s It runs on the base's own list, block by block.", explanation)
        return base_list
    if group["grafting_config"] is None:
        _warn_of_known_bad(config, group["epsilon"], base_list)
    return stacked_list.adopt(base_list, options=config, group=group, **adopted)


def config_for_base(config: PreconditionerConfig | None) -> PreconditionerConfig | None:
    """The config without our options; the base looks its lists up by exact type."""
    cls = base_class_of(config)
    if cls is type(config):
        return config
    plain: PreconditionerConfig = cls(**{f.name: getattr(config, f.name) for f in fields(cls)})
    return plain


def _warn_of_known_bad(config: PreconditionerConfig | None, epsilon: float, base_list: Any) -> None:
    """Warns of combinations that are known to explode without grafting."""
    # Of these classes alone: subclasses are other methods, and the base's own users know their exponents.
    if (
        type(config) is EigenvalueCorrectedShampooPreconditionerConfig
        and isinstance(config.amortized_computation_config, QREigendecompositionConfig)
        and epsilon < _SAFE_EPSILON
    ):
        logger.warning(
            "EigenvalueCorrectedShampooPreconditionerConfig with QREigendecompositionConfig is known to "
            "explode without grafting and with an epsilon as small as %g: it sorts its columns anew in "
            "every refresh. Use DashSOAPPreconditionerConfig, eigh, a grafting_config, or an epsilon of "
            "1e-4.",
            epsilon,
        )
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
