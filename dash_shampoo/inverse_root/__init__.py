"""A^(-1/root) for stacks of factor matrices, by one function and a config that names the solver."""

from dash_shampoo.inverse_root.chebyshev import ChebyshevConfig
from dash_shampoo.inverse_root.chunks import plan_chunks
from dash_shampoo.inverse_root.cost import num_products
from dash_shampoo.inverse_root.coupled_newton import ScaledCoupledNewtonConfig
from dash_shampoo.inverse_root.eigen import SpectrumRepairConfig
from dash_shampoo.inverse_root.minimax.solve import MinimaxConfig
from dash_shampoo.inverse_root.newton_db import NewtonDBConfig
from dash_shampoo.inverse_root.newton_schulz import NewtonSchulzRootInvConfig
from dash_shampoo.inverse_root.registry import (
    check_supported,
    config_for_root,
    waits_for_device,
)
from dash_shampoo.inverse_root.repair import repair
from dash_shampoo.inverse_root.residual import sketched_residual
from dash_shampoo.inverse_root.result import InverseRootResult, InverseRootStatus, StackOutcome
from dash_shampoo.inverse_root.scaling import (
    FrobeniusScaling,
    PowerIterationScaling,
    ScalingConfig,
    TraceScaling,
)
from dash_shampoo.inverse_root.stack import inverse_root, solve_stack

__all__ = [
    "ChebyshevConfig",
    "FrobeniusScaling",
    "InverseRootResult",
    "InverseRootStatus",
    "MinimaxConfig",
    "NewtonDBConfig",
    "NewtonSchulzRootInvConfig",
    "PowerIterationScaling",
    "ScaledCoupledNewtonConfig",
    "ScalingConfig",
    "SpectrumRepairConfig",
    "StackOutcome",
    "TraceScaling",
    "check_supported",
    "config_for_root",
    "inverse_root",
    "num_products",
    "plan_chunks",
    "repair",
    "sketched_residual",
    "solve_stack",
    "waits_for_device",
]
