"""The config of an eigenvalue-corrected Shampoo (SOAP) that works out of the box."""

from __future__ import annotations

from dataclasses import dataclass, field

from dash_shampoo.base import (
    EigendecompositionConfig,
    EigenvalueCorrectedShampooPreconditionerConfig,
)
from dash_shampoo.config import SafetyConfig, StackedConfig
from dash_shampoo.eigenbasis import OrthogonalIterationConfig


@dataclass(kw_only=True)
class DashSOAPPreconditionerConfig(StackedConfig, EigenvalueCorrectedShampooPreconditionerConfig):
    """`EigenvalueCorrectedShampooPreconditionerConfig` with a start and a basis that do no harm.

    The base's, with its QR iterations, without grafting and with a small epsilon, is known to explode: in
    the first step a block's own gradient is all but diagonal in its eigenbasis, so that rounding is
    divided by rounding; and the columns of the basis are sorted anew in every refresh, so that a second
    moment belongs to another column than it was gathered for. Here the first step only gathers
    statistics, every column continues its own, and where a basis changes all at once, the second moment
    is carried over. The state is the base's.

    Choose this for SOAP. Use it without grafting, at Adam's learning rate.

    Attributes:
        amortized_computation_config (EigendecompositionConfig): How eigenvectors are computed.
            (Default: OrthogonalIterationConfig())
        skip_first_step (bool): Whether the first step only gathers: the parameters get no direction, and
            the first gradient enters the second moment in the basis of the parameters. (Default: True)
        align_second_moment (bool): Whether the second moment is carried over, by the squares of the
            change of basis, where the basis changes other than by following: in a first refresh, and in
            every one of a method that sorts its columns. (Default: True)
        max_workspace_bytes (int): As of `DashShampooPreconditionerConfig`. (Default: 2**30)
        safety (SafetyConfig | None): As there. (Default: None)
        use_dimension_normalization (bool): As there. (Default: False)
        stagger_refresh (bool): As there. (Default: False)
    """

    amortized_computation_config: EigendecompositionConfig = field(
        default_factory=OrthogonalIterationConfig
    )
    skip_first_step: bool = True
    align_second_moment: bool = True


DefaultDashSOAPConfig = DashSOAPPreconditionerConfig(
    use_symmetric_packing=False, safety=SafetyConfig()
)
"""SOAP to start from: state kept unpacked, for speed; bad blocks handled one by one."""
