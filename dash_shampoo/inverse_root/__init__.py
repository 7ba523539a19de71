"""A^(-1/root) for stacks of factor matrices, by one function and a config that names the solver."""

from dash_shampoo.inverse_root.dispatch import check_supported, inverse_root
from dash_shampoo.inverse_root.residual import sketched_residual
from dash_shampoo.inverse_root.result import InverseRootResult, InverseRootStatus
from dash_shampoo.inverse_root.stack import StackOutcome, repair, solve_stack

__all__ = [
    "InverseRootResult",
    "InverseRootStatus",
    "StackOutcome",
    "check_supported",
    "inverse_root",
    "repair",
    "sketched_residual",
    "solve_stack",
]
