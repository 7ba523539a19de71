"""What a user can ask for: the inverse-root solvers and how a stack is scaled for them.

A config is given where Distributed Shampoo takes its own:
``RootInvShampooPreconditionerConfig(amortized_computation_config=NewtonDBConfig())``. The base's
`EigenConfig`, `CoupledNewtonConfig` and `CoupledHigherOrderConfig` are accepted as they are and
keep the base's meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, get_args

# The base's solver configs are exported again: the solvers take them from here.
from dash_shampoo.base import CoupledHigherOrderConfig as CoupledHigherOrderConfig
from dash_shampoo.base import CoupledNewtonConfig as CoupledNewtonConfig
from dash_shampoo.base import EigenConfig as EigenConfig
from dash_shampoo.base import PerturbationConfig as PerturbationConfig
from dash_shampoo.base import PseudoInverseConfig as PseudoInverseConfig
from dash_shampoo.base import RankDeficientStabilityConfig as RankDeficientStabilityConfig
from dash_shampoo.base import RootInvConfig as RootInvConfig
from dash_shampoo.base import RootInvShampooPreconditionerConfig

__all__ = [
    "ChebyshevConfig",
    "DashShampooPreconditionerConfig",
    "DefaultDashConfig",
    "FrobeniusScaling",
    "GradientPolicy",
    "MatmulPrecision",
    "MinimaxConfig",
    "NewtonDBConfig",
    "PowerIterationScaling",
    "SafetyConfig",
    "ScaledCoupledNewtonConfig",
    "ScalingConfig",
    "SpectrumRepairConfig",
    "TraceScaling",
]

MatmulPrecision = Literal["fp32", "fp16x3", "tf32", "fp16", "bf16"]
"""Precision of the operands of a product; sums are always fp32.

"fp32" means the factor matrix's own dtype, so float64 stays float64, and never TF32. "fp16x3" splits
each operand into two fp16 numbers, which keeps 22 bits, and multiplies three times.
"""


def _check(owner: object, name: str, is_allowed: bool, allowed: str) -> None:
    """Refuse a field's value, naming the field, the value and what is allowed."""
    if not is_allowed:
        raise ValueError(
            f"Invalid {name}={getattr(owner, name)!r} in {type(owner).__name__}: must be {allowed}."
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_matmul_precision(owner: object, value: str) -> None:
    allowed = get_args(MatmulPrecision)
    _check(owner, "matmul_precision", value in allowed, f"one of {', '.join(allowed)}")


def _check_scaling(owner: object, value: object) -> None:
    _check(owner, "scaling", isinstance(value, ScalingConfig), "a ScalingConfig")


@dataclass(init=False, frozen=True)
class ScalingConfig(ABC):
    """How a solver finds s, by which it divides A so that the spectrum of A/s is at most about 1.

    Abstract: use one of its subclasses.
    """

    @abstractmethod
    def __init__(self) -> None: ...


@dataclass(kw_only=True, frozen=True)
class FrobeniusScaling(ScalingConfig):
    """s = ‖A‖_F, a certified upper bound of λ_max, up to √N above it.

    Choose this when in doubt: it costs no matmul and no iteration can leave its region of
    convergence.
    """


@dataclass(kw_only=True, frozen=True)
class PowerIterationScaling(ScalingConfig):
    """s = safety_factor × the largest Rayleigh quotient after a few power iterations.

    Choose this when the spectrum is flat, so that ‖A‖_F is far above λ_max and costs steps. It is
    an estimate, not a bound: an unlucky start vector can miss the largest eigenvalue by more than
    the safety factor. The start vectors are fixed (own generator), so replicas agree.

    Attributes:
        num_iterations (int): Power iterations, at least 1. (Default: 10)
        num_vectors (int): Start vectors that are iterated at once; the paper uses 1 or 16.
            (Default: 1)
        safety_factor (float): Factor on the estimate, at least 1. (Default: 2.0)
        matmul_precision (MatmulPrecision): Precision of the products A·V; the paper uses bf16.
            (Default: "fp32")
    """

    num_iterations: int = 10
    num_vectors: int = 1
    safety_factor: float = 2.0
    matmul_precision: MatmulPrecision = "fp32"

    def __post_init__(self) -> None:
        for name in ("num_iterations", "num_vectors"):
            value = getattr(self, name)
            _check(self, name, _is_int(value) and value >= 1, "an integer of at least 1")
        _check(self, "safety_factor", 1.0 <= self.safety_factor < float("inf"), "in [1, inf)")
        _check_matmul_precision(self, self.matmul_precision)


@dataclass(kw_only=True, frozen=True)
class TraceScaling(ScalingConfig):
    """s = a certified upper bound of λ_max from the traces of A, A² and A⁴, for one product.

        s = min( m₁/n + √((n-1)/n·(m₂ - m₁²/n)),  √( m₂/n + √((n-1)/n·(m₄ - m₂²/n)) ) )

    with m_i = tr Aⁱ. On factor matrices of real trainings it is within 0.1 % of λ_max in the median
    and never below; the worst case, a spectrum of two equal parts, is a factor of about 2.3. Choose
    this for a solver that wants a tight bound without iterations; `MinimaxConfig` has it built in,
    and there it shares its one product with the solver.
    """


SpectrumRepair = Literal["shampoo", "abs", "abs_add", "relu"]


@dataclass(kw_only=True)
class SpectrumRepairConfig(RankDeficientStabilityConfig):
    """The four repairs of the spectrum λ of A + εI that DASH offers with `eigen`.

    - "shampoo": λ - min(λ_min, 0) + ε
    - "abs": abs(λ - ε)
    - "abs_add": abs(λ - ε) + ε
    - "relu": λ - ε where that is positive and at least ε; the other directions are dropped
      (their inverse root is 0), so the result has low rank.

    Choose this to compare with DASH; `PerturbationConfig`, the base's default, serves otherwise.
    Given as ``EigenConfig(rank_deficient_stability_config=SpectrumRepairConfig(method="abs"))``.

    Attributes:
        method (str): One of the four above. (Default: "shampoo")
    """

    method: SpectrumRepair = "shampoo"

    def __post_init__(self) -> None:
        allowed = get_args(SpectrumRepair)
        _check(self, "method", self.method in allowed, f"one of {', '.join(allowed)}")


@dataclass(kw_only=True)
class ScaledCoupledNewtonConfig(CoupledNewtonConfig):
    """Coupled inverse Newton iteration with a choice of scaling and matmul precision.

    With `FrobeniusScaling` and "fp32" it is the base's `CoupledNewtonConfig`. Choose this when ten
    steps are meant as a cheap damped root (``max_iterations=10``), or half-precision products are.

    Attributes:
        max_iterations (int): Cap on the steps. (Default: 100)
        tolerance (float): A block is done once max|M - I| is at most this. (Default: 1e-6)
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    scaling: ScalingConfig = field(default_factory=FrobeniusScaling)
    matmul_precision: MatmulPrecision = "fp32"

    def __post_init__(self) -> None:
        _check(
            self,
            "max_iterations",
            _is_int(self.max_iterations) and self.max_iterations >= 0,
            "an integer of at least 0",
        )
        _check(self, "tolerance", self.tolerance >= 0.0, "at least 0")
        _check_scaling(self, self.scaling)
        _check_matmul_precision(self, self.matmul_precision)


@dataclass(kw_only=True)
class NewtonDBConfig(RootInvConfig):
    """Newton-Denman-Beavers iteration for the roots 2, 4 and 8: a fixed number of steps, no sync.

    Root 2 is one pass, root 4 two passes (the square root, then its inverse square root), root 8
    three. Choose this to reproduce DASH. Ten steps converge up to a condition number of about
    1e3; beyond it, one pass acts as a damping of about 2.5e-4·s, but two passes over-invert the
    small eigenvalues. Half precision diverges on real factor matrices.

    Attributes:
        num_iterations (int): Steps of each pass, at least 1. (Default: 10)
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
        use_fused_matmul (bool): Whether the two updates of a step, Y·E and E·Z, are one batched
            product over 2B matrices: fewer kernel launches for two copies of the stack. The
            arithmetic is the same. (Default: False)
    """

    num_iterations: int = 10
    scaling: ScalingConfig = field(default_factory=FrobeniusScaling)
    matmul_precision: MatmulPrecision = "fp32"
    use_fused_matmul: bool = False

    def __post_init__(self) -> None:
        _check(
            self,
            "num_iterations",
            _is_int(self.num_iterations) and self.num_iterations >= 1,
            "an integer of at least 1",
        )
        _check_scaling(self, self.scaling)
        _check_matmul_precision(self, self.matmul_precision)


ChebyshevEvaluation = Literal["baby_step_giant_step", "clenshaw"]


@dataclass(kw_only=True)
class ChebyshevConfig(RootInvConfig):
    """A Chebyshev polynomial fitted to x^(-1/root) on [relative_epsilon, 1 + relative_epsilon].

    It takes any positive root and needs no sync. Choose this to reproduce DASH, or for a root
    that no Newton iteration has. One polynomial can't follow x^(-1/root) near 0: with degree 60
    and relative_epsilon 1e-2 / 1e-3 / 1e-4 the root is within 1e-6 / 0.01 / 0.2 of its target;
    with the paper's 1e-10 it is off by up to 2 times for root 4 (0.3 for eigenvalues above
    1e-3·s), and by 4 times for root 2, which is warned of.

    Attributes:
        degree (int): Degree of the polynomial, at least 1. (Default: 60)
        relative_epsilon (float): Damping of the fit relative to s: the target is
            (A/s + relative_epsilon·I)^(-1/root). In (0, 1]. (Default: 1e-10)
        num_nodes (int): Chebyshev nodes of the fit, more than `degree`. (Default: 10000)
        evaluation (str): "baby_step_giant_step" needs about 2√degree matmuls and the workspace of
            as many stacks as there are baby steps (6 for degree 60); "clenshaw" needs degree - 1
            matmuls and three stacks. (Default: "baby_step_giant_step")
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    degree: int = 60
    relative_epsilon: float = 1e-10
    num_nodes: int = 10_000
    evaluation: ChebyshevEvaluation = "baby_step_giant_step"
    scaling: ScalingConfig = field(default_factory=FrobeniusScaling)
    matmul_precision: MatmulPrecision = "fp32"

    def __post_init__(self) -> None:
        _check(
            self, "degree", _is_int(self.degree) and self.degree >= 1, "an integer of at least 1"
        )
        _check(self, "relative_epsilon", 0.0 < self.relative_epsilon <= 1.0, "in (0, 1]")
        _check(
            self,
            "num_nodes",
            _is_int(self.num_nodes) and self.num_nodes > self.degree,
            "an integer above degree",
        )
        allowed = get_args(ChebyshevEvaluation)
        _check(self, "evaluation", self.evaluation in allowed, f"one of {', '.join(allowed)}")
        _check_scaling(self, self.scaling)
        _check_matmul_precision(self, self.matmul_precision)


@dataclass(kw_only=True)
class MinimaxConfig(RootInvConfig):
    """One minimax polynomial of the stack by k squarings, or a chain of them: any root, no sync.

    The polynomial is chosen for the least worst relative error over [λ_max·relative_epsilon, λ_max],
    so the accuracy is known in advance and the same for every factor matrix. Choose this for speed:
    8 products for root 4 and 9 for root 2, at a relative damping of 1e-4 and an accuracy of about
    1 %, where ten steps of Newton-DB take 54 and 27. All its products are squares.

    The damping is *relative*: the result is (A + (epsilon + relative_epsilon·λ̂)·I)^(-1/root), with λ̂
    the bound of `TraceScaling` on λ_max and `epsilon` the absolute damping of the optimizer, which is
    added as with every solver. In an ill-conditioned factor matrix, eigenvalues below
    relative_epsilon·λ̂ are lifted to it; an absolute damping such as 1e-12 alone would invert them to
    whatever rounding has made of them. A factor matrix of zeros gives epsilon^(-1/root)·I, and I with
    epsilon = 0.

    Attributes:
        accuracy (float): Largest relative error of an eigenvalue of the root, before rounding. The
            fewest squarings that reach it are taken. In (0, 1). (Default: 0.015)
        relative_epsilon (float | None): Damping relative to λ̂, in [1e-8, 0.1]. None is 1e-4 for
            roots up to 2 and 1e-6 for larger ones, which need a smaller damping. (Default: None)
        chain (tuple[int | str, ...] | None): Instead of `accuracy`, the degrees of the polynomials,
            each a power of two: (256,) is one polynomial by 8 squarings, (2, 4, 4) and (8, 8) compose
            polynomials through M ← T(M)^root·M, which needs an integer root. "8s" reads as 8.
            (Default: None)
        matmul_precision (MatmulPrecision | tuple[MatmulPrecision, ...]): Precision of the products, or
            a tuple with one for each, the last of which holds for all that follow. With the default
            accuracy, "fp16x3" gives the root of "fp32" at every damping; "tf32" and "fp16" do so for
            full-rank factor matrices down to a relative damping of 1e-4, and with "fp16x3" for the
            first two products for all; "bf16" is for 1e-3. (Default: "fp32")
        margin (float): How far, relatively, the polynomial may be used beyond λ̂ before it grows
            without bound; it covers rounding. In [1e-3, 0.5]. (Default: 0.02)
    """

    accuracy: float = 0.015
    relative_epsilon: float | None = None
    chain: tuple[int | str, ...] | None = None
    matmul_precision: MatmulPrecision | tuple[MatmulPrecision, ...] = "fp32"
    margin: float = 0.02

    def __post_init__(self) -> None:
        _check(self, "accuracy", 0.0 < self.accuracy < 1.0, "in (0, 1)")
        _check(
            self,
            "relative_epsilon",
            self.relative_epsilon is None or 1e-8 <= self.relative_epsilon <= 0.1,
            "in [1e-8, 0.1], or None",
        )
        if self.chain is not None:
            allowed = {degree for power in range(13) for degree in (2**power, str(2**power))} | {
                "8s"
            }
            _check(
                self,
                "chain",
                len(self.chain) > 0 and all(degree in allowed for degree in self.chain),
                "degrees that are powers of two up to 4096, at least one",
            )
        precisions = self.matmul_precision
        for precision in (precisions,) if isinstance(precisions, str) else precisions:
            _check_matmul_precision(self, precision)
        _check(self, "matmul_precision", len(precisions) > 0, "at least one precision")
        _check(self, "margin", 1e-3 <= self.margin <= 0.5, "in [1e-3, 0.5]")


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
            "raise" raises `PreconditionerValueError` naming the parameter. (Default: "skip_block")
    """

    policy: SafetyPolicy = "repair"
    residual_threshold: float | None = 0.3
    gradients: GradientPolicy = "skip_block"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("policy", get_args(SafetyPolicy)),
            ("gradients", get_args(GradientPolicy)),
        ):
            _check(self, name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        _check(
            self,
            "residual_threshold",
            self.residual_threshold is None or self.residual_threshold > 0.0,
            "above 0, or None",
        )


@dataclass(kw_only=True)
class DashShampooPreconditionerConfig(RootInvShampooPreconditionerConfig):
    """`RootInvShampooPreconditionerConfig` with the options of the stacked computation.

    The plain config is stacked too, with the defaults of this one. Choose this to set a cap on the
    solver's memory, or how bad blocks are handled.

    Attributes:
        max_workspace_bytes (int): Cap in bytes on the temporaries of one batched solve; a larger stack is
            solved in chunks, with the same result. (Default: 2**30)
        safety (SafetyConfig | None): How inverse roots are checked and bad blocks handled; None keeps
            the base's rules. (Default: None)
    """

    max_workspace_bytes: int = 2**30
    safety: SafetyConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self,
            "max_workspace_bytes",
            _is_int(self.max_workspace_bytes) and self.max_workspace_bytes >= 1,
            "an integer of at least 1",
        )


DefaultDashConfig = DashShampooPreconditionerConfig(
    amortized_computation_config=MinimaxConfig(),
    inverse_exponent_override=dict.fromkeys(range(1, 6), 0.5),
    use_symmetric_packing=False,
    safety=SafetyConfig(),
)
"""The configuration to start from.

The exponent is 1/2 for every dimension of a tensor (arXiv 2406.17748), which trained better than the
base's 1/(2·order) in the project's measurements and needs fewer products; roots come from
`MinimaxConfig` at its relative damping of 1e-4 and are tested, bad blocks redone by eigendecomposition;
state is kept unpacked, for speed. Use it with grafting:
``DashShampoo(..., grafting_config=AdamPreconditionerConfig(), preconditioner_config=DefaultDashConfig)``.
"""
