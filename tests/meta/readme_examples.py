"""The settings of the seven examples in Meta's README, for any module that has the names of its configs.

Each function takes such a namespace and the parameters, split into hidden matrices and others, and
returns what the optimizer is constructed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

COMMON = {
    "betas": (0.9, 0.999),
    "epsilon": 1e-12,
    "weight_decay": 1e-5,
    "max_preconditioner_dim": 8192,
    "precondition_frequency": 100,
}


def sgd_with_momentum(ns: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": 0.01,
        "betas": (0.0, 0.999),
        "grafting_config": ns.SGDPreconditionerConfig(),
        "iterate_averaging_config": ns.ClassicMomentumConfig(
            momentum=0.9, dampening=0.0, use_nesterov=False
        ),
    }


def adam(ns: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": 0.001,
        "weight_decay_type": ns.WeightDecayType.L2,
        "grafting_config": ns.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    }


def adagrad(ns: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": 0.01,
        "betas": (0.0, 1.0),
        "weight_decay_type": ns.WeightDecayType.L2,
        "grafting_config": ns.AdaGradPreconditionerConfig(epsilon=1e-10),
    }


def adamw(ns: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": 0.001,
        "weight_decay_type": ns.WeightDecayType.DECOUPLED,
        "grafting_config": ns.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
    }


def eigenvalue_corrected(ns: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": 0.001,
        "weight_decay_type": ns.WeightDecayType.DECOUPLED,
        "preconditioner_config": ns.DefaultEigenvalueCorrectedShampooConfig,
    }


def soap(ns: Any) -> dict[str, Any]:
    return eigenvalue_corrected(ns) | {"preconditioner_config": ns.DefaultSOAPConfig}


def scale_by_dims(d_in: int, d_out: int) -> float:
    return max(1, d_out / d_in) ** 0.5


def muon(ns: Any) -> dict[str, Any]:
    return {
        "hidden": {
            "lr": 0.02,
            "preconditioner_config": ns.SpectralDescentPreconditionerConfig(
                orthogonalization_config=ns.NewtonSchulzOrthogonalizationConfig(
                    scale_by_dims_fn=scale_by_dims
                )
            ),
            "max_preconditioner_dim": math.inf,
            "distributed_config": ns.SingleDeviceDistributedConfig(
                target_parameter_dimensionality=2
            ),
        },
        "others": {
            "lr": 3e-4,
            "start_preconditioning_step": math.inf,
            "grafting_config": ns.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-10),
        },
        "weight_decay": 1e-5,
        "weight_decay_type": ns.WeightDecayType.DECOUPLED,
    }


def _averaged(ns: Any, lr: float, config: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": lr,
        "betas": (0.0, 1.0),
        "weight_decay": 0.0,
        "preconditioner_config": ns.SGDPreconditionerConfig(),
        "iterate_averaging_config": config,
    }


def classic_momentum(ns: Any) -> dict[str, Any]:
    config = ns.ClassicMomentumConfig(momentum=0.9, dampening=0.0, use_nesterov=False)
    return _averaged(ns, 0.01, config)


def primal_averaging(ns: Any) -> dict[str, Any]:
    config = ns.GeneralizedPrimalAveragingConfig(eval_interp_coeff=0.9, train_interp_coeff=1.0)
    return _averaged(ns, 0.1, config)


def schedule_free(ns: Any) -> dict[str, Any]:
    return COMMON | {
        "lr": 0.001,
        "weight_decay": 0.0,
        "grafting_config": ns.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
        "iterate_averaging_config": ns.ScheduleFreeConfig(train_interp_coeff=0.9),
    }


EXAMPLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "1 sgd": sgd_with_momentum,
    "2 adam": adam,
    "3 adagrad": adagrad,
    "4 adamw": adamw,
    "5 eigenvalue-corrected": eigenvalue_corrected,
    "5 soap": soap,
    "6 muon": muon,
    "7 classic momentum": classic_momentum,
    "7 primal averaging": primal_averaging,
    "7 schedule-free": schedule_free,
}
"""The examples on one device; those for several processes share `adamw` with epsilon 1e-12."""

ONLY_META = {"5 eigenvalue-corrected", "5 soap", "6 muon"}
"""Examples whose preconditioners the embedded base leaves out."""
