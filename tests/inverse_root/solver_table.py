"""The one table that drives the numeric tests: solver, inputs, tolerance, and why that tolerance.

A new solver adds rows to `SOLVERS`; every test of test_solvers.py then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dash_shampoo.base import (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    RootInvConfig,
)
from dash_shampoo.inverse_root import (
    ChebyshevConfig,
    MinimaxConfig,
    NewtonDBConfig,
    NewtonSchulzRootInvConfig,
    PowerIterationScaling,
    ScaledCoupledNewtonConfig,
    SpectrumRepairConfig,
    TraceScaling,
)
from tests.reference.inverse_root import reference_inverse_root


def _no_damping(A: Tensor) -> Tensor:
    return torch.zeros(A.shape[0], dtype=torch.float64)


def relative_to_frobenius(delta: float) -> Callable[[Tensor], Tensor]:
    """Damping δ·‖A‖_F, what a polynomial fitted to x^(-1/p) on [δ, 1 + δ] aims at."""

    def damping(A: Tensor) -> Tensor:
        return delta * torch.linalg.vector_norm(A.double(), dim=(-2, -1))

    return damping


def relative_to_trace_bound(delta: float) -> Callable[[Tensor], Tensor]:
    """Damping δ·λ̂ with the bound λ̂ of λ_max from the traces of A, A² and A⁴, what `minimax` adds."""

    def damping(A: Tensor) -> Tensor:
        eigenvalues, n = torch.linalg.eigvalsh(A.double()), A.shape[-1]

        def bound(x: Tensor) -> Tensor:
            variance = (x.square().sum(-1) - x.sum(-1).square() / n).clamp_min(0.0)
            return x.sum(-1) / n + ((n - 1) / n * variance).sqrt()

        return delta * torch.minimum(bound(eigenvalues), bound(eigenvalues.square()).sqrt())

    return damping


@dataclass(frozen=True)
class Row:
    """A solver, the inputs it is tested on, and how close it has to come.

    Attributes:
        name: Of the row, unique.
        config: The solver.
        roots: p of A^(-1/p).
        condition: λ_max/λ_min of the test matrices (log-spaced spectrum, λ_max = 1 times a scale).
        float32, float64: Largest allowed relative Frobenius error of a block's root, per dtype.
        why: Where the tolerances come from.
        damping: What the solver adds to A's spectrum by itself, per block (for the reference).
        is_scale_free: Whether f(cA) = c^(-1/p) f(A); false with an absolute damping.
        finite_at_zero: Whether a block of zeros gives a finite root.
        adds_epsilon: Whether the epsilon of `inverse_root` means A + epsilon·I, no more and no less.
    """

    name: str
    config: RootInvConfig
    roots: tuple[float, ...]
    condition: float
    float32: float
    float64: float
    why: str
    damping: Callable[[Tensor], Tensor] = field(default=_no_damping)
    is_scale_free: bool = True
    finite_at_zero: bool = False
    adds_epsilon: bool = True

    @property
    def is_free_of_syncs(self) -> bool:
        """Whether the solver never waits for the device: all but those with a stopping rule, and eigh."""
        return not isinstance(
            self.config, (EigenConfig, CoupledNewtonConfig, CoupledHigherOrderConfig)
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        return self.float64 if dtype == torch.float64 else self.float32

    def reference(self, A: Tensor, root: float) -> Tensor:
        """The float64 roots that the solver aims at."""
        return reference_inverse_root(A, root, self.damping(A))


def _higher_order(order: int) -> CoupledHigherOrderConfig:
    return CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0, order=order)


EIGENVALUES = "eigh's error in λ_min: about N·u·condition relative, over p, with u = 6e-8 (1e-16)"
ITERATION = (
    "round-off of the products, amplified by the condition number; float64: the tolerance 1e-6 of M"
)
FIXED_STEPS = "converged to round-off amplified by the condition number"

SOLVERS: tuple[Row, ...] = (
    Row("eigen", EigenConfig(), (1, 2, 3, 4, 8, 10 / 3), 1e4, 1e-2, 1e-11, EIGENVALUES),
    *(
        Row(
            f"eigen_{method}",
            EigenConfig(rank_deficient_stability_config=SpectrumRepairConfig(method=method)),
            (2, 4),
            1e3,
            1e-3,
            1e-12,
            EIGENVALUES + "; with epsilon = 0 no repair changes a positive spectrum",
            adds_epsilon=False,
        )
        for method in ("shampoo", "abs", "abs_add", "relu")
    ),
    Row("coupled_newton", CoupledNewtonConfig(), (1, 2, 3, 4, 8), 1e3, 1e-4, 1e-5, ITERATION),
    Row(
        "coupled_newton_power_iteration",
        ScaledCoupledNewtonConfig(scaling=PowerIterationScaling()),
        (2, 4),
        1e3,
        1e-4,
        1e-5,
        ITERATION,
        finite_at_zero=True,
    ),
    Row(
        "coupled_newton_fp16",
        ScaledCoupledNewtonConfig(max_iterations=10, matmul_precision="fp16"),
        (2, 4),
        10.0,
        5e-3,
        5e-3,
        "rounding the operands to 11 bits in each of ten steps",
        finite_at_zero=True,
    ),
    Row(
        "coupled_newton_bf16",
        ScaledCoupledNewtonConfig(max_iterations=10, matmul_precision="bf16"),
        (2, 4),
        10.0,
        4e-2,
        4e-2,
        "rounding the operands to 8 bits in each of ten steps",
        finite_at_zero=True,
    ),
    Row(
        "coupled_higher_order",
        _higher_order(3),
        (1, 2, 4, 10 / 3, 3 / 2),
        1e3,
        1e-4,
        1e-6,
        "round-off amplified by the condition number; float64: the tolerance 1e-8 of M, times 1e3",
        adds_epsilon=False,
    ),
    Row(
        "coupled_higher_order_order_2",
        _higher_order(2),
        (2, 4, 10 / 3),
        1e3,
        1e-4,
        1e-6,
        "as of order 3",
        adds_epsilon=False,
    ),
    Row(
        "newton_db",
        NewtonDBConfig(num_iterations=20),
        (2, 4, 8),
        1e3,
        1e-4,
        1e-11,
        FIXED_STEPS,
        finite_at_zero=True,
    ),
    Row(
        "newton_db_multi_power_iteration",
        NewtonDBConfig(num_iterations=20, scaling=PowerIterationScaling(num_vectors=16)),
        (2, 4, 8),
        1e3,
        1e-4,
        1e-11,
        FIXED_STEPS,
        finite_at_zero=True,
    ),
    Row(
        "newton_db_10",
        NewtonDBConfig(),
        (2, 4, 8),
        1e2,
        3e-5,
        2e-5,
        "ten steps at condition 1e2 end within 1e-5 of the limit",
        finite_at_zero=True,
    ),
    Row(
        "newton_db_tf32",
        NewtonDBConfig(matmul_precision="tf32"),
        (2, 4),
        10.0,
        5e-3,
        5e-3,
        "rounding the operands to 11 bits in each of ten steps",
        finite_at_zero=True,
    ),
    Row(
        "newton_db_fp16",
        NewtonDBConfig(matmul_precision="fp16"),
        (2, 4),
        10.0,
        5e-3,
        5e-3,
        "rounding the operands to 11 bits in each of ten steps",
        finite_at_zero=True,
    ),
    *(
        Row(
            f"chebyshev_{evaluation}",
            ChebyshevConfig(degree=40, relative_epsilon=0.05, evaluation=evaluation),
            (2, 4, 10 / 3),
            1e3,
            5e-6,
            1e-8,
            "the fit's error, ρ^-40 = 2e-8 times small factors, and float32 round-off of 40 terms",
            damping=relative_to_frobenius(0.05),
            finite_at_zero=True,
        )
        for evaluation in ("baby_step_giant_step", "clenshaw")
    ),
    Row(
        "newton_db_trace",
        NewtonDBConfig(num_iterations=20, scaling=TraceScaling()),
        (2, 4, 8),
        1e3,
        1e-4,
        1e-11,
        FIXED_STEPS,
        finite_at_zero=True,
    ),
    Row(
        "newton_schulz",
        NewtonSchulzRootInvConfig(relative_epsilon=0.0),
        (2, 4, 8),
        1e4,
        1e-3,
        1e-10,
        FIXED_STEPS,
        finite_at_zero=True,
    ),
    Row(
        "newton_schulz_damped",
        NewtonSchulzRootInvConfig(),
        (2, 4, 8),
        1e8,
        5e-2,
        1e-6,
        "round-off amplified by the condition number that the damping 1e-6·‖A‖_F leaves",
        damping=relative_to_frobenius(1e-6),
        finite_at_zero=True,
        adds_epsilon=False,
    ),
    Row(
        "minimax",
        MinimaxConfig(relative_epsilon=1e-4),
        (1, 2, 8 / 3, 3, 4, 6, 8, 10),
        1e6,
        0.015,
        0.015,
        "the configured accuracy; round-off is below it",
        damping=relative_to_trace_bound(1e-4),
        finite_at_zero=True,
    ),
    Row(
        "minimax_accurate",
        MinimaxConfig(relative_epsilon=1e-4, accuracy=1e-3),
        (2, 4),
        1e6,
        1e-3,
        1e-3,
        "the configured accuracy; round-off is below it",
        damping=relative_to_trace_bound(1e-4),
        finite_at_zero=True,
    ),
    Row(
        "minimax_5_squarings",
        MinimaxConfig(relative_epsilon=1e-3, num_squarings=5),
        (2, 4),
        1e5,
        0.11,
        0.11,
        "the error of five squares: 0.10 for root 2, 0.035 for root 4",
        damping=relative_to_trace_bound(1e-3),
        finite_at_zero=True,
    ),
    *(
        Row(
            f"minimax_{precision}",
            MinimaxConfig(relative_epsilon=epsilon, matmul_precision=precision),
            (2, 4),
            1e6,
            error,
            error,
            "the configured accuracy, and the rounding of operands, amplified by up to 1/epsilon",
            damping=relative_to_trace_bound(epsilon),
            finite_at_zero=True,
        )
        for precision, epsilon, error in (
            ("fp16x3", 1e-4, 0.016),
            ("tf32", 1e-3, 0.025),
            ("fp16", 1e-3, 0.025),
            ("bf16", 1e-2, 0.025),
        )
    ),
)
