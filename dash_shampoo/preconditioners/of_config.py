"""Which stacked list serves which config of the base."""

from __future__ import annotations

from dataclasses import fields

from dash_shampoo.base import (
    EigendecomposedKLShampooPreconditionerConfig,
    EigendecomposedShampooPreconditionerConfig,
    EigenvalueCorrectedShampooPreconditionerConfig,
    MatrixFunctionConfig,
    PreconditionerConfig,
    RootInvKLShampooPreconditionerConfig,
    RootInvShampooPreconditionerConfig,
    SignDescentPreconditionerConfig,
    SpectralDescentPreconditionerConfig,
)
from dash_shampoo.config import base_class_of
from dash_shampoo.preconditioners.eigendecomposed import (
    StackedEigendecomposedKLShampooPreconditionerList,
    StackedEigendecomposedShampooPreconditionerList,
)
from dash_shampoo.preconditioners.eigenvalue_corrected import (
    StackedEigenvalueCorrectedShampooPreconditionerList,
)
from dash_shampoo.preconditioners.root_inverse import (
    StackedRootInvKLShampooPreconditionerList,
    StackedRootInvShampooPreconditionerList,
)
from dash_shampoo.preconditioners.sign_descent import StackedSignDescentPreconditionerList
from dash_shampoo.preconditioners.spectral_descent import StackedSpectralDescentPreconditionerList
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList

# By exact type: a subclass in the base is another method.
_STACKED_LISTS: dict[type, type[StackedPreconditionerList]] = {
    RootInvShampooPreconditionerConfig: StackedRootInvShampooPreconditionerList,
    RootInvKLShampooPreconditionerConfig: StackedRootInvKLShampooPreconditionerList,
    EigendecomposedShampooPreconditionerConfig: StackedEigendecomposedShampooPreconditionerList,
    EigendecomposedKLShampooPreconditionerConfig: StackedEigendecomposedKLShampooPreconditionerList,
    EigenvalueCorrectedShampooPreconditionerConfig: (
        StackedEigenvalueCorrectedShampooPreconditionerList
    ),
    SpectralDescentPreconditionerConfig: StackedSpectralDescentPreconditionerList,
    SignDescentPreconditionerConfig: StackedSignDescentPreconditionerList,
}


def stacked_list_of(
    for_base: PreconditionerConfig | None,
) -> type[StackedPreconditionerList] | None:
    """The list for a config as `config_for_base` gives it; None where the base's own has to do."""
    return _STACKED_LISTS.get(type(for_base))


def config_for_base(config: PreconditionerConfig | None) -> PreconditionerConfig | None:
    """The config without our options; the base looks its lists up by exact type."""
    cls = base_class_of(config)
    if config is None or cls is type(config):
        return config
    plain: PreconditionerConfig = cls(**{f.name: getattr(config, f.name) for f in fields(cls)})
    return plain


def method_of(config: PreconditionerConfig | None) -> MatrixFunctionConfig | None:
    """What a preconditioner computes of matrices, where it computes anything."""
    for name in ("amortized_computation_config", "orthogonalization_config"):
        if hasattr(config, name):
            method: MatrixFunctionConfig = getattr(config, name)
            return method
    return None
