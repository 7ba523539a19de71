"""What a user can ask of the stacked lists: how much memory they take, and what happens to bad blocks.

Solvers are configured beside them, in `dash_shampoo.inverse_root`. A config is given where Distributed
Shampoo takes its own:
``RootInvShampooPreconditionerConfig(amortized_computation_config=NewtonDBConfig())``. The base's
`EigenConfig`, `CoupledNewtonConfig` and `CoupledHigherOrderConfig` are accepted as they are and
keep the base's meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dash_shampoo.base import (
    BaseShampooPreconditionerConfig,
    EigendecomposedKLShampooPreconditionerConfig,
    EigendecomposedShampooPreconditionerConfig,
    PreconditionerConfig,
    RootInvKLShampooPreconditionerConfig,
    RootInvShampooPreconditionerConfig,
)
from dash_shampoo.inverse_root import MinimaxConfig
from dash_shampoo.inverse_root.fields import check_choice, check_field, check_positive_int

__all__ = [
    "DashEigendecomposedKLShampooPreconditionerConfig",
    "DashEigendecomposedShampooPreconditionerConfig",
    "DashKLShampooPreconditionerConfig",
    "DashShampooPreconditionerConfig",
    "DefaultDashConfig",
    "DefaultDashConvnetConfig",
    "GradientPolicy",
    "SafetyConfig",
    "StackedConfig",
    "base_class_of",
    "gradient_policies",
]

SafetyPolicy = Literal["repair", "keep", "raise"]
GradientPolicy = Literal["skip_block", "skip_step", "raise"]


@dataclass(kw_only=True)
class SafetyConfig:
    """What happens to a block whose inverse root is not to be trusted.

    Without it the base's own rules hold: a gradient, a factor matrix or a root that is not finite
    raises, a failed computation keeps the previous root and raises when
    `num_tolerated_failed_amortized_computations` in a row is exceeded. With it, a root is also checked
    by a sketched residual ‖Xᵖ(A + damping·I)v − v‖ / ‖v‖, and every bad block is handled alone.
    Choose this when a run must survive whatever it meets.

    In either case a gradient that is not finite, or whose sum of squares overflows, never enters a
    state: on the device its block is given a gradient of zeros before anything else is computed.

    On an accelerator the outcomes of a refresh travel to the host in the background and are acted on
    at the next refresh, so that no step waits for them; until then a bad block keeps its previous root.

    Attributes:
        policy (str): "repair" computes the bad roots again, those blocks alone: by the same solver with a
            larger damping, else by an eigendecomposition with the eigenvalues clamped and then damped
            (and keeps the previous root where that fails too); "keep" keeps the previous root; "raise"
            raises `PreconditionerValueError` naming the parameter. (Default: "repair")
        residual_threshold (float | None): A root with a larger residual is bad; above 0. None checks
            for finite values alone, for solvers that are stopped early on purpose (Newton-DB).
            (Default: 0.3)
        gradients (str): What a gradient that is not finite leads to: "skip_block" goes on, with that
            block's gradient taken as zero; "skip_step" leaves all parameters and states of its parameter
            group in this process as they are (the host looks in every step: one synchronisation);
            "raise" raises `PreconditionerValueError` naming the parameter. Groups without factor matrices
            (Adam, signs) do as the strictest of the others. (Default: "skip_block")
    """

    policy: SafetyPolicy = "repair"
    residual_threshold: float | None = 0.3
    gradients: GradientPolicy = "skip_block"

    def __post_init__(self) -> None:
        check_choice(self, "policy", SafetyPolicy)
        check_choice(self, "gradients", GradientPolicy)
        check_field(
            self,
            "residual_threshold",
            self.residual_threshold is None or self.residual_threshold > 0.0,
            "above 0, or None",
        )


@dataclass(kw_only=True)
class StackedConfig:
    """The options of the stacked computation, to be put before a config of the base.

    Attributes:
        max_workspace_bytes (int): Cap in bytes on the temporaries of one batched solve; a larger stack is
            solved in chunks, with the same result. (Default: 2**30)
        safety (SafetyConfig | None): How inverse roots are checked and bad blocks handled; None keeps
            the base's rules. (Default: None)
        use_dimension_normalization (bool): Whether an outer product is divided by the number of its
            terms, F_k ← beta2·F_k + w·G₍ₖ₎G₍ₖ₎ᵀ / (numel / d_k), so that factor matrices of blocks of all
            shapes are of one size, and epsilon is the same for all. Where exponents sum to 1/2, an
            update without grafting is then about as long as Adam's. A release of Distributed Shampoo that
            is newer than the one this package is tested with can normalise by dimensions, too; how is
            not public, so this need not be the same. (Default: False)
        stagger_refresh (bool): Whether refreshes are spread over the steps of an interval, so that no step
            is much slower than the others: after `start_preconditioning_step`, in which all are made, every
            step refreshes one of `precondition_frequency` shares of the stacks, of about the same work, and
            each share once in an interval. Choose this where a slow step makes others wait. Shares are
            of a rank's own blocks: on another number of ranks they are others. (Default: False)
    """

    max_workspace_bytes: int = 2**30
    safety: SafetyConfig | None = None
    use_dimension_normalization: bool = False
    stagger_refresh: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the base's config
        check_positive_int(self, "max_workspace_bytes")


def gradient_policies(configs: Sequence[PreconditionerConfig]) -> list[GradientPolicy]:
    """What a gradient that is not finite leads to, for each parameter group of an optimizer.

    A group with factor matrices does as its `safety` says, and raises without. One without (Adam's for
    embeddings, signs, spectral descent) has no `safety` and does as the others: the strictest of them.

    Args:
        configs: The preconditioner configs of all groups.

    Returns:
        One policy per group.
    """
    own: list[GradientPolicy | None] = []
    for config in configs:
        safety: SafetyConfig | None = getattr(config, "safety", None)
        is_bound = hasattr(config, "safety") or isinstance(config, BaseShampooPreconditionerConfig)
        own.append(safety.gradients if safety is not None else "raise" if is_bound else None)
    order: tuple[GradientPolicy, ...] = ("raise", "skip_step", "skip_block")
    strictest: GradientPolicy = next((policy for policy in order if policy in own), "raise")
    return [strictest if policy is None else policy for policy in own]


def base_class_of(config: object) -> type:
    """The base's class of a config, whose lists and state it has: its own where it is not one of ours.

    Args:
        config: A config.

    Returns:
        The class.

    Examples:
        >>> base_class_of(DefaultDashConfig).__name__
        'RootInvShampooPreconditionerConfig'
    """
    return next(cls for cls in type(config).__mro__ if not issubclass(cls, StackedConfig))


@dataclass(kw_only=True)
class DashShampooPreconditionerConfig(StackedConfig, RootInvShampooPreconditionerConfig):
    """`RootInvShampooPreconditionerConfig` with the options of the stacked computation.

    The plain config is stacked too, with the defaults of this one. Choose this to set a cap on the
    solver's memory, or how bad blocks are handled.

    The other configs of the base have one like it: `DashKLShampooPreconditionerConfig`,
    `DashEigendecomposedShampooPreconditionerConfig`, `DashEigendecomposedKLShampooPreconditionerConfig`,
    `DashSOAPPreconditionerConfig`.

    Attributes:
        max_workspace_bytes (int): As of `StackedConfig`. (Default: 2**30)
        safety (SafetyConfig | None): As there. (Default: None)
        use_dimension_normalization (bool): As there. (Default: False)
        stagger_refresh (bool): As there. (Default: False)
    """


@dataclass(kw_only=True)
class DashKLShampooPreconditionerConfig(StackedConfig, RootInvKLShampooPreconditionerConfig):
    """`RootInvKLShampooPreconditionerConfig` with the options of the stacked computation.

    KL-Shampoo divides by the other dimensions (arXiv 2509.03378, equation 5): that is
    `use_dimension_normalization=True`, which the base's config lacks. Choose this for that, or to set how
    bad blocks are handled.

    Attributes:
        max_workspace_bytes (int): As of `StackedConfig`. (Default: 2**30)
        safety (SafetyConfig | None): As there. (Default: None)
        use_dimension_normalization (bool): As there. (Default: False)
        stagger_refresh (bool): As there. (Default: False)
    """


@dataclass(kw_only=True)
class DashEigendecomposedShampooPreconditionerConfig(
    StackedConfig, EigendecomposedShampooPreconditionerConfig
):
    """`EigendecomposedShampooPreconditionerConfig` with the options of the stacked computation.

    Choose this to set a cap on memory, or how bad blocks are handled.

    Attributes:
        max_workspace_bytes (int): As of `StackedConfig`. (Default: 2**30)
        safety (SafetyConfig | None): As there. (Default: None)
        use_dimension_normalization (bool): As there. (Default: False)
        stagger_refresh (bool): As there. (Default: False)
    """


@dataclass(kw_only=True)
class DashEigendecomposedKLShampooPreconditionerConfig(
    StackedConfig, EigendecomposedKLShampooPreconditionerConfig
):
    """`EigendecomposedKLShampooPreconditionerConfig` with the options of the stacked computation.

    Choose this to set a cap on memory, or how bad blocks are handled.

    Attributes:
        max_workspace_bytes (int): As of `StackedConfig`. (Default: 2**30)
        safety (SafetyConfig | None): As there. (Default: None)
        use_dimension_normalization (bool): As there. (Default: False)
        stagger_refresh (bool): As there. (Default: False)
    """


DefaultDashConfig = DashShampooPreconditionerConfig(
    amortized_computation_config=MinimaxConfig(num_squarings=5),
    inverse_exponent_override={1: 0.5, 2: 0.5},
    use_symmetric_packing=False,
    safety=SafetyConfig(),
)
"""The configuration to start from.

Vectors and matrices take the exponent 1/2 for every dimension (arXiv 2406.17748), tensors of order 3 and
more the base's 1/(2·order): both trained better than the other in the project's study. Roots come from five
squarings of `MinimaxConfig`, which train like nine there, and are tested against what five squarings
promise; a bad block is done again. State is kept unpacked, for speed. `dash_shampoo.recipes` has the
arguments that go with it.
Use it with grafting:
``DashShampoo(..., grafting_config=AdamPreconditionerConfig(), preconditioner_config=DefaultDashConfig)``.
"""

DefaultDashConvnetConfig = DashShampooPreconditionerConfig(
    amortized_computation_config=MinimaxConfig(num_squarings=5, relative_epsilon=1e-4),
    use_symmetric_packing=False,
    safety=SafetyConfig(),
)
"""`DefaultDashConfig` for convolutional networks: the base's exponents, 1/4 on each side of a matrix.

In the project's study it ended below the exponent 1/2 on the convnet of MNIST-1D (.193 ± .039 and
.237 ± .012), and within a deviation of it on that of digits (.041 ± .002 and .037 ± .006).
"""
