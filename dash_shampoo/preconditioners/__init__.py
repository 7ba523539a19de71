"""The stacked preconditioner lists: one method a file, what they share in `stacked`."""

from dash_shampoo.preconditioners.root_inverse import StackedRootInvShampooPreconditionerList
from dash_shampoo.preconditioners.scalar import (
    ScalarAdaGradPreconditionerConfig,
    ScalarAdamPreconditionerConfig,
    ScalarRMSpropPreconditionerConfig,
)
from dash_shampoo.preconditioners.soap_config import (
    DashSOAPPreconditionerConfig,
    DefaultDashSOAPConfig,
)

__all__ = [
    "DashSOAPPreconditionerConfig",
    "DefaultDashSOAPConfig",
    "ScalarAdaGradPreconditionerConfig",
    "ScalarAdamPreconditionerConfig",
    "ScalarRMSpropPreconditionerConfig",
    "StackedRootInvShampooPreconditionerList",
]
