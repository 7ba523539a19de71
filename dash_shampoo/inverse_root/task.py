"""One chunk from matrices to roots: the solver, then scaling, symmetry, tests and statuses, the same for all.

After the solver at most one pass goes over the chunk, which scales it, or two that average it with its
transpose. Values that are not finite show in the residual's sketch; only without that a pass looks for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.blocks import divided, per_block
from dash_shampoo.inverse_root.registry import as_root, find_solver
from dash_shampoo.inverse_root.residual import residual_bound, sketch_of, sketched_residual
from dash_shampoo.inverse_root.result import (
    InverseRootStatus,
    Solution,
    StackOutcome,
    is_usable,
)
from dash_shampoo.inverse_root.solver import Solver


@dataclass(frozen=True)
class Task:
    """A solver with all that it is to do.

    Attributes:
        solver (Solver): The solver.
        config (RootInvConfig): Its options.
        root (Fraction): p.
        epsilon (float): Damping.
        bound (float | None): The residual above which a root is bad; None tests none.
    """

    solver: Solver
    config: RootInvConfig
    root: Fraction
    epsilon: float
    bound: float | None

    @classmethod
    def of(
        cls,
        config: RootInvConfig,
        root: int | float | Fraction,
        epsilon: float,
        residual_threshold: float | None,
    ) -> Task:
        """Check what is asked for.

        Args:
            config: The solver and its options.
            root: p of A^(-1/p).
            epsilon: Damping.
            residual_threshold: As of `inverse_root`.

        Returns:
            The task.

        Raises:
            ValueError: If no solver takes the config, the solver can't do the root, or a number is out
                of range.
        """
        fraction = as_root(root)
        solver = find_solver(config)
        solver.check(config, fraction)
        if not 0.0 <= epsilon < float("inf"):
            raise ValueError(f"{epsilon=} must be finite and at least 0.")
        if residual_threshold is not None and not residual_threshold > 0.0:
            raise ValueError(f"{residual_threshold=} must be above 0, or None.")
        bound = None
        if residual_threshold is not None and solver.has_residual:
            bound = residual_bound(residual_threshold, solver.error(config, fraction), fraction)
        return cls(solver, config, fraction, float(epsilon), bound)

    @property
    def num_stacks(self) -> int:
        """N×N matrices held for each matrix, input and output included."""
        return self.solver.workspace(self.config, self.root) + 2


def solve_chunk(
    task: Task,
    A: Tensor,
    *,
    out: Tensor | None = None,
    value_dtype: torch.dtype | None = None,
    divisor: float | Tensor = 1.0,
) -> tuple[Tensor, StackOutcome]:
    """The roots of a chunk, tested and with their statuses.

    Args:
        task: What is computed.
        A: (B, N, N) contiguous, float32 or float64. Not modified.
        out: (B, N, N) where the roots are written; those of blocks that failed are made NaN. Default: a new
            stack, whose bad blocks hold anything.
        value_dtype: The dtype of the roots, without `out`. Default: that of A.
        divisor: The roots are those of A/divisor; a number, or a scalar on the device.

    Returns:
        The roots, and what became of them.
    """
    if not task.solver.divides:
        A, divisor = divided(A, divisor), 1.0
    further = (divisor,) if task.solver.divides else ()
    solution = task.solver.solve(A, task.root, task.config, task.epsilon, *further)
    value = _finished(solution, out)
    status, residual = solution.status, solution.residual
    sketch = value
    if task.bound is not None:
        sketch = sketch_of(value)
        residual = sketched_residual(A, value, task.root, solution.damping, sketch, divisor)
        is_inaccurate = residual > task.bound
        if not is_known_to_be(False, is_inaccurate):
            status = _with_inaccurate(status, is_inaccurate)
    # The sketch of a root that is not finite is not finite, whatever the cause.
    if task.bound is None or residual is None or not is_known_to_be(True, residual.isfinite()):
        status = _with_non_finite(status, A, sketch, solution.size)
    if status is None:
        status = torch.zeros(A.shape[0], dtype=torch.uint8, device=A.device)
    if out is not None:
        is_void = (status >= int(InverseRootStatus.NON_FINITE_INPUT)) & (
            status <= int(InverseRootStatus.FAILED)
        )
        if not is_known_to_be(False, is_void):
            value.masked_fill_(per_block(is_void), torch.nan)
    if value_dtype is not None and value_dtype != value.dtype:
        value, status = _narrowed(value, status, value_dtype)
    return value, StackOutcome(
        status, solution.damping, solution.iterations, torch.nan if residual is None else residual
    )


def _finished(solution: Solution, out: Tensor | None) -> Tensor:
    """scale·X, or scale·(X + Xᵀ)/2."""
    X, scale = solution.X, solution.scale
    if not solution.is_symmetric:
        X = torch.add(X, X.mT) if out is None else torch.add(X, X.mT, out=out)
        return X.mul_(0.5 if scale is None else per_block(0.5 * scale))
    if scale is not None:
        return X.mul_(per_block(scale)) if out is None else torch.mul(X, per_block(scale), out=out)
    return X if out is None else out.copy_(X)


def _with_inaccurate(status: Tensor | None, is_inaccurate: Tensor) -> Tensor:
    """The status, with the blocks marked whose residual is too large."""
    codes = _codes(is_inaccurate.device)
    if status is None:
        status = codes[InverseRootStatus.SUCCESS]
    else:
        is_inaccurate = is_inaccurate & is_usable(status)
    return torch.where(is_inaccurate, codes[InverseRootStatus.INACCURATE], status)


def _with_non_finite(
    status: Tensor | None, A: Tensor, sketch: Tensor, size: Tensor | None
) -> Tensor | None:
    """The status, with the blocks marked whose matrix or root, known by its sketch, is not finite."""
    is_finite = finite_blocks(sketch)
    if is_known_to_be(True, is_finite):
        return status
    is_input_finite = finite_blocks(A) if size is None else size < torch.inf
    codes = _codes(A.device)
    bad = torch.where(
        is_input_finite,
        codes[InverseRootStatus.NON_FINITE_RESULT],
        codes[InverseRootStatus.NON_FINITE_INPUT],
    )
    if status is None:
        return torch.where(is_finite, codes[InverseRootStatus.SUCCESS], bad)
    keeps = is_finite | (is_input_finite & (status == int(InverseRootStatus.FAILED)))
    return torch.where(keeps, status, bad)


@cache
def _codes(device: torch.device) -> Tensor:
    """The statuses by their number, on the device."""
    return torch.tensor(list(InverseRootStatus), dtype=torch.uint8, device=device)


def _narrowed(value: Tensor, status: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The roots in another dtype; those that overflow in it are no longer usable."""
    narrow = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        overflows = is_usable(status) & ~finite_blocks(narrow)
        status = status.masked_fill(overflows, int(InverseRootStatus.NON_FINITE_RESULT))
    return narrow, status


def finite_blocks(A: Tensor) -> Tensor:
    """(B,) bool: whether all entries of a block are finite."""
    if A.device.type == "cpu":
        # Sums of finite entries are finite but for overflow, and take one pass without a copy.
        is_finite = torch.isfinite(A.sum(dim=(-2, -1)))
        if bool(is_finite.all()):
            return is_finite
        return torch.isfinite(A).flatten(1).all(dim=1)
    largest: Tensor = torch.linalg.vector_norm(A.flatten(1), ord=torch.inf, dim=1)
    return largest < torch.inf


def is_known_to_be(value: bool, flags: Tensor) -> bool:
    """Whether all flags are `value`, or False where only a host sync could tell (not on the CPU)."""
    if flags.device.type != "cpu":
        return False
    return bool(flags.all()) if value else not bool(flags.any())
