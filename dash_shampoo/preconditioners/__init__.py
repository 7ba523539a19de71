"""The stacked preconditioner lists: one method a file, what they share in `stacked`."""

from dash_shampoo.preconditioners.eigendecomposed import (
    StackedEigendecomposedKLShampooPreconditionerList,
    StackedEigendecomposedShampooPreconditionerList,
)
from dash_shampoo.preconditioners.eigenvalue_corrected import (
    StackedEigenvalueCorrectedShampooPreconditionerList,
)
from dash_shampoo.preconditioners.grafting import precondition_and_graft
from dash_shampoo.preconditioners.known_bad import warn_of_known_bad
from dash_shampoo.preconditioners.of_config import config_for_base, method_of, stacked_list_of
from dash_shampoo.preconditioners.options import StackedOptions
from dash_shampoo.preconditioners.refresh import Outcomes
from dash_shampoo.preconditioners.root_inverse import (
    StackedRootInvKLShampooPreconditionerList,
    StackedRootInvShampooPreconditionerList,
)
from dash_shampoo.preconditioners.scalar import (
    ScalarAdaGradPreconditionerConfig,
    ScalarAdagradPreconditionerList,
    ScalarAdamPreconditionerConfig,
    ScalarRMSpropPreconditionerConfig,
    scalar_list,
)
from dash_shampoo.preconditioners.seams import explanation_of, fall_back, missing_seam
from dash_shampoo.preconditioners.sign_descent import StackedSignDescentPreconditionerList
from dash_shampoo.preconditioners.soap_config import (
    DashSOAPPreconditionerConfig,
    DefaultDashSOAPConfig,
)
from dash_shampoo.preconditioners.spectral_descent import StackedSpectralDescentPreconditionerList
from dash_shampoo.preconditioners.stacked import BucketView, StackedPreconditionerList

__all__ = [
    "BucketView",
    "DashSOAPPreconditionerConfig",
    "DefaultDashSOAPConfig",
    "Outcomes",
    "ScalarAdaGradPreconditionerConfig",
    "ScalarAdagradPreconditionerList",
    "ScalarAdamPreconditionerConfig",
    "ScalarRMSpropPreconditionerConfig",
    "StackedEigendecomposedKLShampooPreconditionerList",
    "StackedEigendecomposedShampooPreconditionerList",
    "StackedEigenvalueCorrectedShampooPreconditionerList",
    "StackedOptions",
    "StackedPreconditionerList",
    "StackedRootInvKLShampooPreconditionerList",
    "StackedRootInvShampooPreconditionerList",
    "StackedSignDescentPreconditionerList",
    "StackedSpectralDescentPreconditionerList",
    "config_for_base",
    "explanation_of",
    "fall_back",
    "method_of",
    "missing_seam",
    "precondition_and_graft",
    "scalar_list",
    "stacked_list_of",
    "warn_of_known_bad",
]
