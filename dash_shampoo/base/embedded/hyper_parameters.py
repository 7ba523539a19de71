"""Checks of a parameter group's hyper-parameters."""

import logging
import math
from dataclasses import replace
from typing import Any

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.configs import (
    BaseShampooPreconditionerConfig,
    SpectralDescentPreconditionerConfig,
    WeightDecayType,
)
from dash_shampoo.base.embedded.matrix_function_configs import (
    EigendecompositionConfig,
    PseudoInverseConfig,
    check,
)

logger = logging.getLogger(__name__)


def check_and_complete(group: dict[str, Any]) -> None:
    """Checks a group and resolves beta3 = -1 and start_preconditioning_step = -1.

    Args:
        group: The parameter group; modified.

    Raises:
        ValueError: Naming the hyper-parameter, its value and the allowed range.
    """
    check(
        bool(group[keys.PARAMS]), keys.PARAMS, group[keys.PARAMS], "a non-empty list of parameters"
    )
    check(group[keys.LR] >= 0.0, keys.LR, group[keys.LR], ">= 0.0")
    beta1, beta2 = group[keys.BETAS]
    check(0.0 <= beta1 < 1.0, f"{keys.BETAS}[0]", beta1, "in [0.0, 1.0)")
    check(0.0 <= beta2 <= 1.0, f"{keys.BETAS}[1]", beta2, "in [0.0, 1.0]")
    if group[keys.BETA3] == -1.0:
        group[keys.BETA3] = beta1
    check(
        0.0 <= group[keys.BETA3] < 1.0,
        keys.BETA3,
        group[keys.BETA3],
        "in [0.0, 1.0), or -1.0 for beta1",
    )
    if _uses_pseudo_inverse(group[keys.PRECONDITIONER_CONFIG]):
        allowed = "0.0 when PseudoInverseConfig is used"
        check(group[keys.EPSILON] == 0.0, keys.EPSILON, group[keys.EPSILON], allowed)
    else:
        check(group[keys.EPSILON] > 0.0, keys.EPSILON, group[keys.EPSILON], "> 0.0")
    check(group[keys.WEIGHT_DECAY] >= 0.0, keys.WEIGHT_DECAY, group[keys.WEIGHT_DECAY], ">= 0.0")
    decay_type = group[keys.WEIGHT_DECAY_TYPE]
    if decay_type in (WeightDecayType.CORRECTED, WeightDecayType.INDEPENDENT):
        allowed = f"> 0.0 with weight_decay_type={decay_type}"
        check(group[keys.PEAK_LR] > 0.0, keys.PEAK_LR, group[keys.PEAK_LR], allowed)
    dim = group[keys.MAX_PRECONDITIONER_DIM]
    is_whole = not isinstance(dim, float) or dim == math.inf
    check(is_whole, keys.MAX_PRECONDITIONER_DIM, dim, "an int or math.inf")
    check(dim >= 1, keys.MAX_PRECONDITIONER_DIM, dim, ">= 1")
    frequency, start = group[keys.PRECONDITION_FREQUENCY], group[keys.START_PRECONDITIONING_STEP]
    check(frequency >= 1, keys.PRECONDITION_FREQUENCY, frequency, ">= 1")
    if start == -1:
        group[keys.START_PRECONDITIONING_STEP] = start = frequency
        logger.info("start_preconditioning_step=-1: set to precondition_frequency=%d.", frequency)
    check(
        start >= frequency,
        keys.START_PRECONDITIONING_STEP,
        start,
        f">= precondition_frequency={frequency}, or -1 for the same",
    )
    _reshape_to_matrices(group)


def _reshape_to_matrices(group: dict[str, Any]) -> None:
    """Spectral descent is for matrices: nothing is merged beyond them."""
    config = group[keys.DISTRIBUTED_CONFIG]
    is_spectral = isinstance(group[keys.PRECONDITIONER_CONFIG], SpectralDescentPreconditionerConfig)
    if is_spectral and config.target_parameter_dimensionality != 2:
        logger.warning(
            "target_parameter_dimensionality=%s: set to 2 for spectral descent.",
            config.target_parameter_dimensionality,
        )
        group[keys.DISTRIBUTED_CONFIG] = replace(config, target_parameter_dimensionality=2)


def _uses_pseudo_inverse(config: object) -> bool:
    if not isinstance(config, BaseShampooPreconditionerConfig):
        return False
    solver = config.amortized_computation_config
    return isinstance(solver, EigendecompositionConfig) and isinstance(
        solver.rank_deficient_stability_config, PseudoInverseConfig
    )
