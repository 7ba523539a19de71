"""Distributed Shampoo with stacked blocks and fast batched inverse roots.

Swap `DistributedShampoo(...)` for `DashShampoo(...)` and keep every setting; then choose a solver:

    preconditioner_config=RootInvShampooPreconditionerConfig(
        amortized_computation_config=NewtonDBConfig()
    )

The configs of Distributed Shampoo are re-exported here under their own names. They come from Meta's
package where it is importable, else from the embedded base; `dash_shampoo.base.name` tells which.
"""

# ruff: noqa: F403, F405 (the names are listed once, in __all__)

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from dash_shampoo import base as _base
from dash_shampoo.base import *
from dash_shampoo.checkpoint import safe_globals
from dash_shampoo.config import *
from dash_shampoo.diagnostics import BlockDiagnostics, FactorDiagnostics
from dash_shampoo.distribution import DashDDPDistributedConfig
from dash_shampoo.eigenbasis import OrthogonalIterationConfig
from dash_shampoo.grouping import ParamGroups, ParamRule, param_groups
from dash_shampoo.inverse_root import (
    ChebyshevConfig,
    FrobeniusScaling,
    MinimaxConfig,
    NewtonDBConfig,
    NewtonSchulzRootInvConfig,
    PowerIterationScaling,
    ScaledCoupledNewtonConfig,
    ScalingConfig,
    SpectrumRepairConfig,
    TraceScaling,
)
from dash_shampoo.optimizer import DashShampoo
from dash_shampoo.orthogonalization import (
    GramOrthogonalizationConfig,
    MinimaxPolarConfig,
    MuonOrthogonalizationConfig,
    match_rms_adamw,
    muon_original,
)
from dash_shampoo.preconditioners import (
    DashSOAPPreconditionerConfig,
    DefaultDashSOAPConfig,
    ScalarAdaGradPreconditionerConfig,
    ScalarAdamPreconditionerConfig,
    ScalarRMSpropPreconditionerConfig,
)

try:
    __version__ = _version("dash-shampoo")
except _PackageNotFoundError:  # a checkout on PYTHONPATH, not installed
    __version__ = "0+checkout"
from dash_shampoo import recipes
from dash_shampoo.planning import Parallelism, plan_optimizer

__all__ = [
    "AdaGradPreconditionerConfig",
    "AdamPreconditionerConfig",
    "AlignedMemoryCostModel",
    "BaseShampooPreconditionerConfig",
    "BlockDiagnostics",
    "ChebyshevConfig",
    "ClassicMomentumConfig",
    "ClassicShampooPreconditionerConfig",
    "ConcurrencyConfig",
    "CostModel",
    "CoupledHigherOrderConfig",
    "CoupledNewtonConfig",
    "DDPDistributedConfig",
    "DashDDPDistributedConfig",
    "DashEigendecomposedKLShampooPreconditionerConfig",
    "DashEigendecomposedShampooPreconditionerConfig",
    "DashKLShampooPreconditionerConfig",
    "DashSOAPPreconditionerConfig",
    "DashShampoo",
    "DashShampooPreconditionerConfig",
    "DefaultConcurrencyConfig",
    "DefaultDashConfig",
    "DefaultDashConvnetConfig",
    "DefaultDashSOAPConfig",
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
    "FSDPParamAssignmentStrategy",
    "FactorDiagnostics",
    "FrobeniusScaling",
    "FullyShardDistributedConfig",
    "GeneralizedPrimalAveragingConfig",
    "GramOrthogonalizationConfig",
    "HybridShardDistributedConfig",
    "IterateAveragingConfig",
    "LoadBalancingConfig",
    "MatrixFunctionConfig",
    "MinimaxConfig",
    "MinimaxPolarConfig",
    "MuonOrthogonalizationConfig",
    "NewtonDBConfig",
    "NewtonSchulzOrthogonalizationConfig",
    "NewtonSchulzRootInvConfig",
    "OrthogonalIterationConfig",
    "OrthogonalizationConfig",
    "Parallelism",
    "ParamGroups",
    "ParamRule",
    "PerturbationConfig",
    "PolynomialComputationalCostModel",
    "PowerIterationScaling",
    "PreconditionerConfig",
    "PreconditionerValueError",
    "PseudoInverseConfig",
    "QREigendecompositionConfig",
    "RMSpropPreconditionerConfig",
    "RankDeficientStabilityConfig",
    "RootInvConfig",
    "RootInvKLShampooPreconditionerConfig",
    "RootInvShampooPreconditionerConfig",
    "SGDPreconditionerConfig",
    "SVDOrthogonalizationConfig",
    "SafetyConfig",
    "ScalarAdaGradPreconditionerConfig",
    "ScalarAdamPreconditionerConfig",
    "ScalarRMSpropPreconditionerConfig",
    "ScaledCoupledNewtonConfig",
    "ScalingConfig",
    "ScheduleFreeConfig",
    "ShampooPT2CompileConfig",
    "ShampooRuntimeConfig",
    "SignDescentPreconditionerConfig",
    "SingleDeviceDistributedConfig",
    "SpectralDescentPreconditionerConfig",
    "SpectrumRepairConfig",
    "TraceScaling",
    "WeightDecayType",
    "__version__",
    "match_rms_adamw",
    "muon_original",
    "param_groups",
    "plan_optimizer",
    "recipes",
    "safe_globals",
]

if not _TYPE_CHECKING:

    def __getattr__(missing: str) -> _Any:
        if missing in _base.META_ONLY:
            return getattr(_base, missing)
        raise AttributeError(f"module {__name__!r} has no attribute {missing!r}")
