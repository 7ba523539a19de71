"""Configs of the matrix functions: inverse roots, eigendecompositions, orthogonalisation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self


class Config:
    """Base of all configs; a subclass declared with `abstract=True` cannot be instantiated."""

    _is_abstract: ClassVar[bool] = True

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._is_abstract = abstract

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Refuses to instantiate an abstract config."""
        if cls._is_abstract:
            raise TypeError(f"{cls.__name__} is abstract: instantiate one of its subclasses.")
        return super().__new__(cls)

    def _check(self, condition: bool, name: str, allowed: str) -> None:
        """Raises the ValueError that names a field, its value and what is allowed, unless `condition`."""
        check(condition, name, getattr(self, name), allowed)


def check(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises the ValueError that names an option, its value and what is allowed, unless `condition`."""
    if not condition:
        raise ValueError(f"Invalid {name}={value!r}: must be {allowed}.")


@dataclass
class RankDeficientStabilityConfig(Config, abstract=True):
    """How a singular or indefinite matrix is made invertible."""


@dataclass(kw_only=True)
class PerturbationConfig(RankDeficientStabilityConfig):
    """Damping: adds epsilon to the eigenvalues. Choose this unless you want a pseudo-inverse.

    Attributes:
        perturb_before_computation: Whether epsilon·I is added to the matrix before it is decomposed
            rather than to the eigenvalues after. (Default: True)
    """

    perturb_before_computation: bool = True


@dataclass(kw_only=True)
class PseudoInverseConfig(RankDeficientStabilityConfig):
    """Drops eigenvalues at or below max(rank_atol, rank_rtol·λ_max). Needs epsilon = 0.

    Attributes:
        rank_atol: Absolute tolerance. (Default: 0.0)
        rank_rtol: Relative tolerance; None means dimension × machine epsilon. (Default: 0.0)
    """

    rank_atol: float = 0.0
    rank_rtol: float | None = 0.0


DefaultPerturbationConfig = PerturbationConfig()


@dataclass
class MatrixFunctionConfig(Config, abstract=True):
    """A function of a matrix that is computed every `precondition_frequency` steps."""


@dataclass
class EigendecompositionConfig(MatrixFunctionConfig, abstract=True):
    """An eigendecomposition A = Q diag(λ) Qᵀ.

    Attributes:
        rank_deficient_stability_config: See there. (Default: PerturbationConfig())
        tolerance: Relative off-diagonal norm of QᵀAQ, in [0, 1], below which the previous
            eigenvectors Q are kept. (Default: 0.0)
    """

    rank_deficient_stability_config: RankDeficientStabilityConfig = field(
        default_factory=PerturbationConfig
    )
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        self._check(0.0 <= self.tolerance <= 1.0, "tolerance", "in [0.0, 1.0]")


@dataclass(kw_only=True)
class EighEigendecompositionConfig(EigendecompositionConfig):
    """Eigendecomposition by `torch.linalg.eigh`.

    Attributes:
        retry_double_precision: Whether a failed decomposition is repeated in float64.
            (Default: True)
        eigendecomposition_offload_device: Device on which to decompose; "" means the matrix's own.
            (Default: "")
    """

    retry_double_precision: bool = True
    eigendecomposition_offload_device: str = ""


@dataclass(kw_only=True)
class QREigendecompositionConfig(EigendecompositionConfig):
    """Eigendecomposition by warm-started QR iterations.

    Attributes:
        max_iterations: Cap on the iterations. (Default: 1)
    """

    max_iterations: int = 1


DefaultEigendecompositionConfig = EighEigendecompositionConfig()


@dataclass
class RootInvConfig(MatrixFunctionConfig, abstract=True):
    """An inverse root A^(-1/p)."""


@dataclass(kw_only=True)
class EigenConfig(RootInvConfig, EighEigendecompositionConfig):
    """Inverse root by eigendecomposition; `tolerance` must stay 0. Choose this for accuracy."""

    def __post_init__(self) -> None:
        EighEigendecompositionConfig.__post_init__(self)
        self._check(self.tolerance == 0.0, "tolerance", "0.0 for an inverse root")


@dataclass(kw_only=True)
class CoupledNewtonConfig(RootInvConfig):
    """Inverse root by the coupled Newton iteration, for integer roots p.

    Attributes:
        max_iterations: Cap on the iterations. (Default: 100)
        tolerance: Largest entry of |M - I| at which the iteration stops. (Default: 1e-6)
    """

    max_iterations: int = 100
    tolerance: float = 1e-6


@dataclass(kw_only=True)
class CoupledHigherOrderConfig(RootInvConfig):
    """Inverse root by a coupled iteration of higher order, for rational roots p/q.

    Attributes:
        rel_epsilon: Damping relative to an upper bound of λ_max.
        abs_epsilon: Absolute damping; the larger of both is added.
        max_iterations: Cap on the iterations. (Default: 100)
        tolerance: Largest entry of |M - I| at which the iteration stops. (Default: 1e-8)
        order: Order of convergence, at least 2 (Newton). (Default: 3)
        disable_tf32: Whether tf32 is off during the iteration. (Default: True)
    """

    rel_epsilon: float
    abs_epsilon: float
    max_iterations: int = 100
    tolerance: float = 1e-8
    order: int = 3
    disable_tf32: bool = True


DefaultEigenConfig = EigenConfig()


def _no_scaling(d_in: int, d_out: int) -> float:
    del d_in, d_out
    return 1.0


@dataclass
class OrthogonalizationConfig(MatrixFunctionConfig, abstract=True):
    """The nearest orthogonal matrix.

    Attributes:
        scale_by_dims_fn: Factor as a function of the matrix's dimensions. (Default: 1)
    """

    scale_by_dims_fn: Callable[[int, int], float] = _no_scaling


@dataclass(kw_only=True)
class SVDOrthogonalizationConfig(OrthogonalizationConfig):
    """Orthogonalisation by a singular value decomposition.

    Attributes:
        scale_by_nuclear_norm: Whether the result is scaled by the nuclear norm. (Default: False)
    """

    scale_by_nuclear_norm: bool = False


@dataclass(kw_only=True)
class NewtonSchulzOrthogonalizationConfig(OrthogonalizationConfig):
    """Orthogonalisation by the quintic Newton-Schulz iteration.

    Attributes:
        num_iterations: Fixed number of iterations. (Default: 5)
        coefficients: The quintic polynomial's. (Default: (3.4445, -4.7750, 2.0315))
    """

    num_iterations: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)


DefaultNewtonSchulzOrthogonalizationConfig = NewtonSchulzOrthogonalizationConfig()
