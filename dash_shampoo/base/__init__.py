"""The one door to Distributed Shampoo: Meta's package if it is importable, else the embedded base.

The environment variable DASH_SHAMPOO_BASE chooses before the first import: `auto` (the default),
`meta` or `embedded`; `dash_shampoo.base.name` tells. Both bases have the same names here. For type
checkers they are the embedded base's.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from dash_shampoo.base.embedded.blocking import grid_view
from dash_shampoo.base.embedded.state import native_config as _native_config

_VARIABLE = "DASH_SHAMPOO_BASE"
_PACKAGE = "distributed_shampoo"
_HOW_TO_GET_IT = (
    "pip install git+https://github.com/facebookresearch/optimizers "
    "(as in the dependency group `meta` of dash_shampoo's pyproject.toml)"
)
# Where Meta's package has the names that it does not export itself.
_SHAMPOO_TYPES = f"{_PACKAGE}.shampoo_types"
_LOAD_BALANCING = f"{_PACKAGE}.utils.load_balancing_utils"
_META_MODULES = {
    "DISTRIBUTOR": _SHAMPOO_TYPES,
    "FILTERED_GRAD_LIST": _SHAMPOO_TYPES,
    "GRAFTING_PRECONDITIONER_LIST": _SHAMPOO_TYPES,
    "MASKED_BLOCKED_GRADS": _SHAMPOO_TYPES,
    "MASKED_BLOCKED_PARAMS": _SHAMPOO_TYPES,
    "MASKED_FILTERED_GRAD_LIST": _SHAMPOO_TYPES,
    "MASKED_MOMENTUM_BUFFER_LIST": _SHAMPOO_TYPES,
    "MASKED_WEIGHT_BUFFER_LIST": _SHAMPOO_TYPES,
    "MOMENTUM_BUFFER_LIST": _SHAMPOO_TYPES,
    "PREVIOUS_GRAD_SELECTOR": _SHAMPOO_TYPES,
    "SHAMPOO_PRECONDITIONER_LIST": _SHAMPOO_TYPES,
    "WEIGHT_BUFFER_LIST": _SHAMPOO_TYPES,
    "AdagradPreconditionerList": f"{_PACKAGE}.preconditioner.adagrad_preconditioner_list",
    "AlignedMemoryCostModel": _LOAD_BALANCING,
    "ClassicMomentumConfig": _SHAMPOO_TYPES,
    "ConcurrencyConfig": _SHAMPOO_TYPES,
    "CostModel": _LOAD_BALANCING,
    "DefaultConcurrencyConfig": _SHAMPOO_TYPES,
    "DefaultShampooRuntimeConfig": _SHAMPOO_TYPES,
    "LoadBalancingConfig": _SHAMPOO_TYPES,
    "PolynomialComputationalCostModel": _LOAD_BALANCING,
    "PreconditionerValueError": _SHAMPOO_TYPES,
    "RootInvShampooPreconditionerList": f"{_PACKAGE}.preconditioner.shampoo_preconditioner_list",
    "SGDPreconditionerList": f"{_PACKAGE}.preconditioner.sgd_preconditioner_list",
    "ShampooRuntimeConfig": _SHAMPOO_TYPES,
}

if TYPE_CHECKING:
    from dash_shampoo.base.embedded import (
        DISTRIBUTOR,
        FILTERED_GRAD_LIST,
        GRAFTING_PRECONDITIONER_LIST,
        MASKED_BLOCKED_GRADS,
        MASKED_BLOCKED_PARAMS,
        MASKED_FILTERED_GRAD_LIST,
        MASKED_MOMENTUM_BUFFER_LIST,
        MASKED_WEIGHT_BUFFER_LIST,
        MOMENTUM_BUFFER_LIST,
        PREVIOUS_GRAD_SELECTOR,
        SHAMPOO_PRECONDITIONER_LIST,
        WEIGHT_BUFFER_LIST,
        AdaGradPreconditionerConfig,
        AdagradPreconditionerList,
        AdamPreconditionerConfig,
        AlignedMemoryCostModel,
        BaseShampooPreconditionerConfig,
        ClassicMomentumConfig,
        ClassicShampooPreconditionerConfig,
        ConcurrencyConfig,
        CostModel,
        CoupledHigherOrderConfig,
        CoupledNewtonConfig,
        DDPDistributedConfig,
        DefaultConcurrencyConfig,
        DefaultEigenConfig,
        DefaultEigendecompositionConfig,
        DefaultEigenvalueCorrectedShampooConfig,
        DefaultNewtonSchulzOrthogonalizationConfig,
        DefaultPerturbationConfig,
        DefaultShampooConfig,
        DefaultShampooRuntimeConfig,
        DefaultSignDescentPreconditionerConfig,
        DefaultSingleDeviceDistributedConfig,
        DefaultSOAPConfig,
        DefaultSpectralDescentPreconditionerConfig,
        DistributedConfig,
        DistributedShampoo,
        EigenConfig,
        EigendecomposedKLShampooPreconditionerConfig,
        EigendecomposedShampooPreconditionerConfig,
        EigendecompositionConfig,
        EigenvalueCorrectedShampooPreconditionerConfig,
        EighEigendecompositionConfig,
        FSDPDistributedConfig,
        FSDPParamAssignmentStrategy,
        FullyShardDistributedConfig,
        GeneralizedPrimalAveragingConfig,
        HSDPDistributedConfig,
        HybridShardDistributedConfig,
        IterateAveragingConfig,
        LoadBalancingConfig,
        MatrixFunctionConfig,
        NewtonSchulzOrthogonalizationConfig,
        OrthogonalizationConfig,
        PerturbationConfig,
        PolynomialComputationalCostModel,
        PreconditionerConfig,
        PreconditionerValueError,
        PseudoInverseConfig,
        QREigendecompositionConfig,
        RankDeficientStabilityConfig,
        RMSpropPreconditionerConfig,
        RootInvConfig,
        RootInvKLShampooPreconditionerConfig,
        RootInvShampooPreconditionerConfig,
        RootInvShampooPreconditionerList,
        ScheduleFreeConfig,
        SGDPreconditionerConfig,
        SGDPreconditionerList,
        ShampooPT2CompileConfig,
        ShampooRuntimeConfig,
        SignDescentPreconditionerConfig,
        SingleDeviceDistributedConfig,
        SpectralDescentPreconditionerConfig,
        SVDOrthogonalizationConfig,
        WeightDecayType,
        compile_fsdp_parameter_metadata,
    )

__all__ = [
    "DISTRIBUTOR",
    "FILTERED_GRAD_LIST",
    "GRAFTING_PRECONDITIONER_LIST",
    "MASKED_BLOCKED_GRADS",
    "MASKED_BLOCKED_PARAMS",
    "MASKED_FILTERED_GRAD_LIST",
    "MASKED_MOMENTUM_BUFFER_LIST",
    "MASKED_WEIGHT_BUFFER_LIST",
    "MOMENTUM_BUFFER_LIST",
    "PREVIOUS_GRAD_SELECTOR",
    "SHAMPOO_PRECONDITIONER_LIST",
    "WEIGHT_BUFFER_LIST",
    "AdaGradPreconditionerConfig",
    "AdagradPreconditionerList",
    "AdamPreconditionerConfig",
    "AlignedMemoryCostModel",
    "BaseShampooPreconditionerConfig",
    "ClassicMomentumConfig",
    "ClassicShampooPreconditionerConfig",
    "ConcurrencyConfig",
    "CostModel",
    "CoupledHigherOrderConfig",
    "CoupledNewtonConfig",
    "DDPDistributedConfig",
    "DefaultConcurrencyConfig",
    "DefaultEigenConfig",
    "DefaultEigendecompositionConfig",
    "DefaultEigenvalueCorrectedShampooConfig",
    "DefaultNewtonSchulzOrthogonalizationConfig",
    "DefaultPerturbationConfig",
    "DefaultSOAPConfig",
    "DefaultShampooConfig",
    "DefaultShampooRuntimeConfig",
    "DefaultSignDescentPreconditionerConfig",
    "DefaultSingleDeviceDistributedConfig",
    "DefaultSpectralDescentPreconditionerConfig",
    "DistributedConfig",
    "DistributedShampoo",
    "EigenConfig",
    "EigendecomposedKLShampooPreconditionerConfig",
    "EigendecomposedShampooPreconditionerConfig",
    "EigendecompositionConfig",
    "EigenvalueCorrectedShampooPreconditionerConfig",
    "EighEigendecompositionConfig",
    "FSDPDistributedConfig",
    "FSDPParamAssignmentStrategy",
    "FullyShardDistributedConfig",
    "GeneralizedPrimalAveragingConfig",
    "HSDPDistributedConfig",
    "HybridShardDistributedConfig",
    "IterateAveragingConfig",
    "LoadBalancingConfig",
    "MatrixFunctionConfig",
    "NewtonSchulzOrthogonalizationConfig",
    "OrthogonalizationConfig",
    "PerturbationConfig",
    "PolynomialComputationalCostModel",
    "PreconditionerConfig",
    "PreconditionerValueError",
    "PseudoInverseConfig",
    "QREigendecompositionConfig",
    "RMSpropPreconditionerConfig",
    "RankDeficientStabilityConfig",
    "RootInvConfig",
    "RootInvKLShampooPreconditionerConfig",
    "RootInvShampooPreconditionerConfig",
    "RootInvShampooPreconditionerList",
    "SGDPreconditionerConfig",
    "SGDPreconditionerList",
    "SVDOrthogonalizationConfig",
    "ScheduleFreeConfig",
    "ShampooPT2CompileConfig",
    "ShampooRuntimeConfig",
    "SignDescentPreconditionerConfig",
    "SingleDeviceDistributedConfig",
    "SpectralDescentPreconditionerConfig",
    "WeightDecayType",
    "compile_fsdp_parameter_metadata",
    "grid_view",
    "name",
    "native_config",
]


# The same on both bases.
_OURS = ("grid_view", "name", "native_config")


def _choose(variables: Mapping[str, str]) -> Literal["meta", "embedded"]:
    """The base to use: what the variable says, or what there is.

    Raises:
        ImportError: If Meta's package is asked for and not importable.
        ValueError: If the variable has another value.
    """
    choice = variables.get(_VARIABLE, "auto")
    if choice not in ("auto", "meta", "embedded"):
        raise ValueError(f"Invalid {_VARIABLE}={choice!r}: must be auto, meta or embedded.")
    if choice == "embedded":
        return "embedded"
    try:
        import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        # Only the package itself may be missing: one that is there and broken must not be ignored.
        if error.name != _PACKAGE:
            raise
        if choice == "auto":
            return "embedded"
        raise ImportError(
            f"{_VARIABLE}=meta, but the package {_PACKAGE} is not installed: {_HOW_TO_GET_IT}.",
            name=_PACKAGE,
        ) from error
    return "meta"


def _load(base: Literal["meta", "embedded"]) -> dict[str, Any]:
    exported = [n for n in __all__ if n not in _OURS]
    if base == "embedded":
        module = import_module("dash_shampoo.base.embedded")
        return {n: getattr(module, n) for n in exported}
    return {n: getattr(import_module(_META_MODULES.get(n, _PACKAGE)), n) for n in exported}


def native_config(value: Any) -> Any:
    """Rebuilds a config that was saved on the other base as this base's class of the same name.

    Args:
        value: A config, possibly with nested ones; anything else is returned as it is.

    Returns:
        The config in this base's classes.
    """
    return _native_config(value, globals())


name: Literal["meta", "embedded"] = _choose(os.environ)
if not TYPE_CHECKING:
    globals().update(_load(name))
