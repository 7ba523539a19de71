"""Configs of preconditioners, grafting, iterate averaging, weight decay, compilation and running."""

import enum
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded import matrix_function_configs as functions
from dash_shampoo.base.embedded.matrix_function_configs import Config, check


@dataclass
class PreconditionerConfig(Config, abstract=True):
    """A preconditioner, as the optimizer's own or as the one whose norm is grafted."""


@dataclass
class SGDPreconditionerConfig(PreconditionerConfig):
    """The identity. As grafting: the norm of the (filtered) gradient."""


@dataclass(kw_only=True)
class AdaGradPreconditionerConfig(PreconditionerConfig):
    """G / (sqrt(V) + epsilon) with V the sum of the squared gradients.

    Attributes:
        epsilon: Damping, positive. (Default: 1e-10)
    """

    epsilon: float = 1e-10

    def __post_init__(self) -> None:
        self._check(self.epsilon > 0.0, "epsilon", "> 0.0")


@dataclass(kw_only=True)
class RMSpropPreconditionerConfig(AdaGradPreconditionerConfig):
    """As AdaGrad, with V an EMA of the squared gradients.

    Attributes:
        beta2: Decay of the EMA, in (0, 1]. (Default: 0.99)
        drop_weighting_factor_on_gsquare: Whether V ← beta2·V + G², without the factor 1 - beta2 and
            without bias correction. (Default: False)
    """

    beta2: float = 0.99
    drop_weighting_factor_on_gsquare: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(0.0 < self.beta2 <= 1.0, "beta2", "in (0.0, 1.0]")


@dataclass(kw_only=True)
class AdamPreconditionerConfig(RMSpropPreconditionerConfig):
    """As RMSprop, with bias correction of V. Choose this to keep a learning rate tuned for Adam.

    Attributes:
        beta2: Decay of the EMA, in (0, 1]. (Default: 0.999)
    """

    beta2: float = 0.999


@dataclass
class BaseShampooPreconditionerConfig(PreconditionerConfig, abstract=True):
    """A preconditioner made of Kronecker factors.

    Attributes:
        amortized_computation_config: The matrix function that is computed now and then.
        drop_weighting_factor_on_gsquare: Whether F ← beta2·F + GGᵀ, without the factor 1 - beta2 and
            without bias correction. (Default: False)
        factor_matrix_dtype: Dtype of the factor matrices. (Default: torch.float32)
        num_tolerated_failed_amortized_computations: How many times in a row the computation of a
            block may fail. (Default: 3)
        use_symmetric_packing: Whether only the upper triangles are stored. (Default: True)
        use_trace_scaling: Whether a factor is divided by a power of its trace first. (Default: False)
        trace_scaling_exponent: That power, in (0, 1]. (Default: 0.5)
    """

    amortized_computation_config: functions.MatrixFunctionConfig = field(repr=False)
    drop_weighting_factor_on_gsquare: bool = False
    factor_matrix_dtype: torch.dtype = torch.float32
    num_tolerated_failed_amortized_computations: int = 3
    use_symmetric_packing: bool = True
    use_trace_scaling: bool = False
    trace_scaling_exponent: float = 0.5

    def __post_init__(self) -> None:
        name = "num_tolerated_failed_amortized_computations"
        self._check(getattr(self, name) >= 0, name, ">= 0")
        is_exponent = not self.use_trace_scaling or 0.0 < self.trace_scaling_exponent <= 1.0
        allowed = "in (0.0, 1.0] when use_trace_scaling=True"
        self._check(is_exponent, "trace_scaling_exponent", allowed)

    def _by_order(self, name: str) -> Iterator[tuple[str, Any]]:
        """The entries of a dict by order of the block, named; keys and dimensions in them are checked."""
        for order, entry in getattr(self, name).items():
            check(order >= 0, f"order in {name}", order, ">= 0")
            entry_name, last = f"{name}[{order}]", max(order - 1, 0)
            for dimension in () if isinstance(entry, (int, float)) else entry:
                allowed = f"in [0, {last}]"
                check(0 <= dimension <= last, f"dimension in {entry_name}", dimension, allowed)
            yield entry_name, entry


@dataclass
class ClassicShampooPreconditionerConfig(BaseShampooPreconditionerConfig, abstract=True):
    """Shampoo: every preconditioned dimension of a block has its factor matrix F and exponent.

    Attributes:
        inverse_exponent_override: Exponents a of F^(-a) by order of the block, for all its dimensions
            or by dimension; 0.0 leaves a dimension alone. Not given: 1/(2·max(order, 1)).
            (Default: {})
    """

    inverse_exponent_override: dict[int, dict[int, float] | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, override in self._by_order("inverse_exponent_override"):
            if isinstance(override, dict):
                for dimension, exponent in override.items():
                    check(exponent >= 0.0, f"{name}[{dimension}]", exponent, ">= 0.0")
            else:
                check(isinstance(override, float), name, override, "a dict or a float")
                check(override >= 0.0, name, override, ">= 0.0")


@dataclass(kw_only=True)
class RootInvShampooPreconditionerConfig(ClassicShampooPreconditionerConfig):
    """Shampoo that stores the inverse roots of the factor matrices.

    Attributes:
        amortized_computation_config: How the inverse roots are computed. (Default: EigenConfig())
        inv_factor_matrix_dtype: Dtype of the inverse factor matrices. (Default: torch.float32)
    """

    amortized_computation_config: functions.RootInvConfig = field(
        default_factory=functions.EigenConfig
    )
    inv_factor_matrix_dtype: torch.dtype = torch.float32


@dataclass(kw_only=True)
class RootInvKLShampooPreconditionerConfig(RootInvShampooPreconditionerConfig):
    """KL-Shampoo with stored inverse roots; computed on stacks alone (`DashShampoo`)."""


@dataclass(kw_only=True)
class EigendecomposedShampooPreconditionerConfig(ClassicShampooPreconditionerConfig):
    """Shampoo that stores the eigendecompositions; computed on stacks alone (`DashShampoo`).

    Attributes:
        amortized_computation_config: How eigenvectors are computed.
            (Default: EighEigendecompositionConfig())
        factor_matrix_eigenvectors_dtype: Dtype of the eigenvectors. (Default: torch.float32)
        factor_matrix_eigenvalues_dtype: Dtype of the eigenvalues. (Default: torch.float32)
    """

    amortized_computation_config: functions.EigendecompositionConfig = field(
        default_factory=functions.EighEigendecompositionConfig
    )
    factor_matrix_eigenvectors_dtype: torch.dtype = torch.float32
    factor_matrix_eigenvalues_dtype: torch.dtype = torch.float32


@dataclass(kw_only=True)
class EigendecomposedKLShampooPreconditionerConfig(EigendecomposedShampooPreconditionerConfig):
    """KL-Shampoo with stored eigendecompositions; computed on stacks alone (`DashShampoo`)."""


@dataclass(kw_only=True)
class EigenvalueCorrectedShampooPreconditionerConfig(BaseShampooPreconditionerConfig):
    """Adam in the eigenbasis of Shampoo's factors (SOAP); computed on stacks alone (`DashShampoo`).

    Attributes:
        amortized_computation_config: How eigenvectors are computed.
            (Default: EighEigendecompositionConfig())
        ignored_basis_change_dims: Dimensions by order of the block that keep their basis. (Default: {})
        inverse_exponent_override: Exponent of the second moment by order of the block. Not given: 1/2.
            (Default: {})
        factor_matrix_eigenvectors_dtype: Dtype of the eigenvectors. (Default: torch.float32)
        corrected_eigenvalues_dtype: Dtype of the second moment. (Default: torch.float32)
    """

    amortized_computation_config: functions.EigendecompositionConfig = field(
        default_factory=functions.EighEigendecompositionConfig
    )
    ignored_basis_change_dims: dict[int, list[int]] = field(default_factory=dict)
    inverse_exponent_override: dict[int, float] = field(default_factory=dict)
    factor_matrix_eigenvectors_dtype: torch.dtype = torch.float32
    corrected_eigenvalues_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        stability = self.amortized_computation_config.rank_deficient_stability_config
        is_perturbed = isinstance(stability, functions.PerturbationConfig)
        check(is_perturbed, "rank_deficient_stability_config", stability, "a PerturbationConfig")
        for name, dimensions in self._by_order("ignored_basis_change_dims"):
            check(len(set(dimensions)) == len(dimensions), name, dimensions, "without repetitions")
        for name, exponent in self._by_order("inverse_exponent_override"):
            check(exponent > 0.0, name, exponent, "> 0.0")


@dataclass(kw_only=True)
class SpectralDescentPreconditionerConfig(PreconditionerConfig):
    """Orthogonalised search directions (Muon), of matrices alone; on stacks (`DashShampoo`).

    Attributes:
        orthogonalization_config: How. (Default: NewtonSchulzOrthogonalizationConfig())
    """

    orthogonalization_config: functions.OrthogonalizationConfig = field(
        default_factory=functions.NewtonSchulzOrthogonalizationConfig
    )


def _unit_scale(grad: Tensor) -> float:
    del grad
    return 1.0


@dataclass(kw_only=True)
class SignDescentPreconditionerConfig(PreconditionerConfig):
    """The sign of the gradient; computed on stacks alone (`DashShampoo`).

    Attributes:
        scale_fn: Factor of a block's signs as a function of its gradient. (Default: 1)
    """

    scale_fn: Callable[[Tensor], float | Tensor] = _unit_scale


DefaultShampooConfig = RootInvShampooPreconditionerConfig()
DefaultEigenvalueCorrectedShampooConfig = EigenvalueCorrectedShampooPreconditionerConfig()
DefaultSOAPConfig = EigenvalueCorrectedShampooPreconditionerConfig(
    amortized_computation_config=functions.QREigendecompositionConfig()
)
DefaultSpectralDescentPreconditionerConfig = SpectralDescentPreconditionerConfig()
DefaultSignDescentPreconditionerConfig = SignDescentPreconditionerConfig()


@dataclass
class IterateAveragingConfig(Config, abstract=True):
    """What is done with the sequence of iterates: momentum or averaging."""


@dataclass(kw_only=True)
class ClassicMomentumConfig(IterateAveragingConfig):
    """Heavy-ball or Nesterov momentum on the search direction: M ← momentum·M + (1 - dampening)·P.

    Attributes:
        momentum: In (0, 1); None as the whole config means no momentum. (Default: 0.5)
        dampening: In [0, 1). (Default: 0.0)
        use_nesterov: Whether P ← (1 - dampening)·P + momentum·M instead of P ← M. (Default: False)
    """

    momentum: float = 0.5
    dampening: float = 0.0
    use_nesterov: bool = False

    def __post_init__(self) -> None:
        self._check(0.0 < self.momentum < 1.0, "momentum", "in (0.0, 1.0)")
        self._check(0.0 <= self.dampening < 1.0, "dampening", "in [0.0, 1.0)")


@dataclass(kw_only=True)
class GeneralizedPrimalAveragingConfig(IterateAveragingConfig):
    """Gradients at Y = μ_y·X + (1 - μ_y)·Z, evaluation at the average X ← μ_x·X + (1 - μ_x)·Z.

    arXiv 2512.17131. Call the optimizer's `eval()` before evaluation, `train()` before training.

    Attributes:
        eval_interp_coeff: μ_x, in [0, 1). (Default: 0.9)
        train_interp_coeff: μ_y, in (0, 1]. (Default: 0.8)
    """

    eval_interp_coeff: float = 0.9
    train_interp_coeff: float = 0.8

    def __post_init__(self) -> None:
        self._check(0.0 <= self.eval_interp_coeff < 1.0, "eval_interp_coeff", "in [0.0, 1.0)")
        self._check(0.0 < self.train_interp_coeff <= 1.0, "train_interp_coeff", "in (0.0, 1.0]")


@dataclass(kw_only=True)
class ScheduleFreeConfig(IterateAveragingConfig):
    """Primal averaging with μ_x = 1 - lr_t^r / Σ lr_i^r (arXiv 2405.15682, equation 23).

    Attributes:
        train_interp_coeff: μ_y, in (0, 1]. (Default: 0.8)
        eval_coeff_lr_power: r. (Default: 2)
    """

    train_interp_coeff: float = 0.8
    eval_coeff_lr_power: int = 2

    def __post_init__(self) -> None:
        self._check(0.0 < self.train_interp_coeff <= 1.0, "train_interp_coeff", "in (0.0, 1.0]")


class WeightDecayType(enum.Enum):
    """How weight decay w enters, with W the parameter and P the search direction.

    L2: G ← G + w·W. DECOUPLED: P ← P + w·W. CORRECTED: P ← P + w·(lr / peak_lr)·W.
    INDEPENDENT: P ← P + (w / peak_lr)·W.
    """

    L2 = "L2"
    DECOUPLED = "DECOUPLED"
    CORRECTED = "CORRECTED"
    INDEPENDENT = "INDEPENDENT"


_CompileOptions: Any = make_dataclass(
    "_CompileOptions",
    [
        (name, Any, field(default=parameter.default))
        for name, parameter in inspect.signature(torch.compile).parameters.items()
        if name != "model"
    ],
    kw_only=True,
)


class ShampooPT2CompileConfig(_CompileOptions):  # type: ignore[misc]
    """The keyword arguments of `torch.compile`, for compiling the step of a parameter group."""


@dataclass(kw_only=True)
class ShampooRuntimeConfig:
    """Options that checkpoints leave out.

    Attributes:
        eager_nan_check: Whether gradients are checked in every step, at the price of a host sync per
            parameter. (Default: False)
    """

    eager_nan_check: bool = False


@dataclass(kw_only=True)
class ConcurrencyConfig:
    """How the steps of the parameter groups run side by side.

    Attributes:
        enable_cuda_stream_for_param_groups: Whether every group has its own CUDA stream, where all
            groups are on CUDA. (Default: True)
    """

    enable_cuda_stream_for_param_groups: bool = True


DefaultShampooRuntimeConfig = ShampooRuntimeConfig()
DefaultConcurrencyConfig = ConcurrencyConfig()
