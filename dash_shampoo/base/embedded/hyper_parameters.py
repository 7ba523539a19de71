"""Checks of a parameter group's hyper-parameters."""

import logging
import math
from dataclasses import replace
from typing import Any

from dash_shampoo.base.embedded.configs import SpectralDescentPreconditionerConfig, WeightDecayType
from dash_shampoo.base.embedded.matrix_function_configs import PseudoInverseConfig, check

logger = logging.getLogger(__name__)


def check_and_complete(group: dict[str, Any]) -> None:
    """Checks a group and resolves beta3 = -1 and start_preconditioning_step = -1.

    Args:
        group: The parameter group; modified.

    Raises:
        ValueError: Naming the hyper-parameter, its value and the allowed range.
    """

    def check_option(name: str, condition: bool, allowed: str) -> None:
        check(condition, name, group[name], allowed)

    check_option("params", bool(group["params"]), "a non-empty list of parameters")
    check_option("preconditioner_config", group["preconditioner_config"] is not None, "a config")
    check_option("lr", group["lr"] >= 0.0, ">= 0.0")
    beta1, beta2 = group["betas"]
    check(0.0 <= beta1 < 1.0, "betas[0]", beta1, "in [0.0, 1.0)")
    check(0.0 <= beta2 <= 1.0, "betas[1]", beta2, "in [0.0, 1.0]")
    if group["beta3"] == -1.0:
        group["beta3"] = beta1
    check_option("beta3", 0.0 <= group["beta3"] < 1.0, "in [0.0, 1.0), or -1.0 for beta1")
    solver = getattr(group["preconditioner_config"], "amortized_computation_config", None)
    stability = getattr(solver, "rank_deficient_stability_config", None)
    if isinstance(stability, PseudoInverseConfig):
        check_option("epsilon", group["epsilon"] == 0.0, "0.0 when PseudoInverseConfig is used")
    else:
        check_option("epsilon", group["epsilon"] > 0.0, "> 0.0")
    check_option("weight_decay", group["weight_decay"] >= 0.0, ">= 0.0")
    decay_type = group["weight_decay_type"]
    if decay_type in (WeightDecayType.CORRECTED, WeightDecayType.INDEPENDENT):
        allowed = f"> 0.0 with weight_decay_type={decay_type}"
        check_option("peak_lr", group["peak_lr"] > 0.0, allowed)
    dim = group["max_preconditioner_dim"]
    is_whole = not isinstance(dim, float) or dim == math.inf
    check_option("max_preconditioner_dim", is_whole, "an int or math.inf")
    check_option("max_preconditioner_dim", dim >= 1, ">= 1")
    frequency = group["precondition_frequency"]
    check_option("precondition_frequency", frequency >= 1, ">= 1")
    if group["start_preconditioning_step"] == -1:
        group["start_preconditioning_step"] = frequency
        logger.info("start_preconditioning_step=-1: set to precondition_frequency=%d.", frequency)
    is_late = group["start_preconditioning_step"] >= frequency
    allowed = f">= precondition_frequency={frequency}, or -1 for the same"
    check_option("start_preconditioning_step", is_late, allowed)

    config = group["distributed_config"]
    is_spectral = isinstance(group["preconditioner_config"], SpectralDescentPreconditionerConfig)
    if is_spectral and config.target_parameter_dimensionality != 2:
        logger.warning(
            "target_parameter_dimensionality=%s: set to 2 for spectral descent, which is of matrices.",
            config.target_parameter_dimensionality,
        )
        group["distributed_config"] = replace(config, target_parameter_dimensionality=2)
