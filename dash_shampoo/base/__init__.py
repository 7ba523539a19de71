"""The one door to Distributed Shampoo: Meta's package if it is importable, else the embedded base.

The environment variable DASH_SHAMPOO_BASE chooses before the first import: `auto` (the default),
`meta` or `embedded`; `dash_shampoo.base.name` tells. Both bases have the same names here, but for those
that say they need Meta's package. For type checkers they are the embedded base's.
"""

# ruff: noqa: F403, F405 (the names are listed once, in __all__)

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from dash_shampoo.base.embedded.blocking import BlockGrid, GridBlocks
from dash_shampoo.base.embedded.distributed_configs import assign_owners
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.factories import own_distributor_class as _own_distributor_class
from dash_shampoo.base.embedded.flight import Flight
from dash_shampoo.base.embedded.group_state import take_weights
from dash_shampoo.base.embedded.keys import ROW_PARTS
from dash_shampoo.base.embedded.packing import pack, packed_diagonal, unpack
from dash_shampoo.base.embedded.parts import blocks_of_shards, sizes_of_parts
from dash_shampoo.base.embedded.state import native_config as _native_config

_VARIABLE = "DASH_SHAMPOO_BASE"
_PACKAGE = "distributed_shampoo"
_HOW_TO_GET_IT = (
    "pip install git+https://github.com/facebookresearch/optimizers "
    "(as in the dependency group `meta` of dash_shampoo's pyproject.toml)"
)
# Where Meta's package has its names; its own `__init__` has most of those that are for users.
_META_MODULES = (
    _PACKAGE,
    f"{_PACKAGE}.shampoo_types",
    f"{_PACKAGE}.utils.load_balancing_utils",
    f"{_PACKAGE}.preconditioner.shampoo_preconditioner_list",
    f"{_PACKAGE}.preconditioner.adagrad_preconditioner_list",
    f"{_PACKAGE}.preconditioner.sgd_preconditioner_list",
    f"{_PACKAGE}.preconditioner.preconditioner_list",
)

# What only Meta's package has (FSDP1); without it, the names say so.
META_ONLY = ("FSDPDistributedConfig", "HSDPDistributedConfig", "compile_fsdp_parameter_metadata")

__all__ = [
    "DISTRIBUTOR",
    "FILTERED_GRAD_LIST",
    "GRAFTING_PRECONDITIONER_LIST",
    "LR_CPU_PINNED",
    "MASKED_BLOCKED_GRADS",
    "MASKED_BLOCKED_PARAMS",
    "MASKED_FILTERED_GRAD_LIST",
    "MASKED_MOMENTUM_BUFFER_LIST",
    "MASKED_WEIGHT_BUFFER_LIST",
    "META_ONLY",
    "MOMENTUM_BUFFER_LIST",
    "PREVIOUS_GRAD_SELECTOR",
    "ROW_PARTS",
    "SHAMPOO_PRECONDITIONER_LIST",
    "WEIGHT_BUFFER_LIST",
    "AdaGradPreconditionerConfig",
    "AdagradPreconditionerList",
    "AdamPreconditionerConfig",
    "AlignedMemoryCostModel",
    "BaseShampooPreconditionerConfig",
    "BlockGrid",
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
    "Distributor",
    "EigenConfig",
    "EigendecomposedKLShampooPreconditionerConfig",
    "EigendecomposedShampooPreconditionerConfig",
    "EigendecompositionConfig",
    "EigenvalueCorrectedShampooPreconditionerConfig",
    "EighEigendecompositionConfig",
    "FSDPParamAssignmentStrategy",
    "Flight",
    "FullyShardDistributedConfig",
    "GeneralizedPrimalAveragingConfig",
    "GridBlocks",
    "HybridShardDistributedConfig",
    "IterateAveragingConfig",
    "LoadBalancingConfig",
    "MatrixFunctionConfig",
    "NewtonSchulzOrthogonalizationConfig",
    "OrthogonalizationConfig",
    "PerturbationConfig",
    "PolynomialComputationalCostModel",
    "PreconditionerConfig",
    "PreconditionerList",
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
    "assign_owners",
    "blocks_of_shards",
    "name",
    "native_config",
    "own_distributor_class",
    "pack",
    "packed_diagonal",
    "sizes_of_parts",
    "take_weights",
    "unpack",
]


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


def _load_meta() -> dict[str, Any]:
    """Everything that the door takes from Meta's package.

    Raises:
        ImportError: If it lacks a name.
    """
    wanted = {*__all__, *META_ONLY} - _OURS
    found: dict[str, Any] = {}
    for module in map(import_module, _META_MODULES):
        found |= {n: getattr(module, n) for n in wanted - found.keys() if hasattr(module, n)}
    if missing := wanted - found.keys():
        raise ImportError(
            f"This version of {_PACKAGE} lacks {', '.join(sorted(missing))}: use the one that "
            f"dash_shampoo is tested with ({_HOW_TO_GET_IT}), or {_VARIABLE}=embedded."
        )
    return found


def native_config(value: Any) -> Any:
    """Rebuilds a config that was saved on the other base as this base's class of the same name.

    Args:
        value: A config, possibly with nested ones; anything else is returned as it is.

    Returns:
        The config in this base's classes.
    """
    return _native_config(value, globals())


def own_distributor_class(config: Any) -> type[Distributor] | None:
    """The embedded base's distributor for a config of either base.

    They read no more than both bases' configs have, and give the state the same keys and values.

    Args:
        config: A distributed config.

    Returns:
        The class, or None where only Meta's package has one.
    """
    # By exact type: what a subclass adds would be ignored.
    if type(config) is not globals().get(type(config).__name__):
        return None
    return _own_distributor_class(config)


def _say_what_is_missing(missing: str) -> Any:
    if missing in META_ONLY:
        raise ImportError(
            f"{missing} (FSDP1) is not in the embedded base of dash_shampoo: fully_shard with "
            "FullyShardDistributedConfig is, and Meta's package has both. To get it: "
            f"{_HOW_TO_GET_IT}; then leave {_VARIABLE} unset."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {missing!r}")


name: Literal["meta", "embedded"] = _choose(os.environ)
# What is here so far is the same on both bases.
_OURS = frozenset(globals())
if TYPE_CHECKING or name == "embedded":
    from dash_shampoo.base.embedded.configs import *
    from dash_shampoo.base.embedded.distributed_configs import *
    from dash_shampoo.base.embedded.keys import *
    from dash_shampoo.base.embedded.matrix_function_configs import *
    from dash_shampoo.base.embedded.optimizer import DistributedShampoo
    from dash_shampoo.base.embedded.preconditioner_list import (
        AdagradPreconditionerList,
        PreconditionerList,
        PreconditionerValueError,
        SGDPreconditionerList,
    )
    from dash_shampoo.base.embedded.shampoo_list import RootInvShampooPreconditionerList
else:
    globals().update(_load_meta())

if TYPE_CHECKING:
    FSDPDistributedConfig: Any
    HSDPDistributedConfig: Any
    compile_fsdp_parameter_metadata: Any
else:
    __getattr__ = _say_what_is_missing
