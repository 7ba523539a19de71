"""The stacked preconditioner lists: one method a file, what they share in `stacked`."""

from dash_shampoo.preconditioners.root_inverse import (
    StackedRootInvKLShampooPreconditionerList,
    StackedRootInvShampooPreconditionerList,
)
from dash_shampoo.preconditioners.stacked import (
    BucketView,
    StackedPreconditionerList,
    missing_seam,
)

__all__ = [
    "BucketView",
    "StackedPreconditionerList",
    "StackedRootInvKLShampooPreconditionerList",
    "StackedRootInvShampooPreconditionerList",
    "missing_seam",
]
