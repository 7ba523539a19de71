"""What an optimizer costs on many ranks, planned without allocating it: `plan_optimizer`."""

from dash_shampoo.planning.costs import StepCost
from dash_shampoo.planning.devices import DEVICES, Device
from dash_shampoo.planning.optimizer_plan import (
    InverseRoots,
    OptimizerPlan,
    balance,
    plan_optimizer,
)
from dash_shampoo.planning.ranks import SHARED, RankPlan, StackCount
from dash_shampoo.planning.solver_cost import REFERENCE_CONDITION_NUMBER, SolverCost
from dash_shampoo.planning.spread import Parallelism, Strategy, parallelism_of

__all__ = [
    "DEVICES",
    "REFERENCE_CONDITION_NUMBER",
    "SHARED",
    "Device",
    "InverseRoots",
    "OptimizerPlan",
    "Parallelism",
    "RankPlan",
    "SolverCost",
    "StackCount",
    "StepCost",
    "Strategy",
    "balance",
    "parallelism_of",
    "plan_optimizer",
]
