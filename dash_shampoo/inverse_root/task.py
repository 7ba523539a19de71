"""One chunk from matrices to roots: the solver, then scaling, symmetry, tests and statuses, the same for all.

After the solver at most two passes go over the chunk: one that scales (or averages with the transpose),
and on an accelerator one that looks for values that are not finite; the CPU sees those in the residual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.blocks import per_block
from dash_shampoo.inverse_root.registry import as_root, find_solver
from dash_shampoo.inverse_root.residual import residual_bound, sketched_residual
from dash_shampoo.inverse_root.result import InverseRootResult, InverseRootStatus, Solution
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
    task: Task, A: Tensor, *, out: Tensor | None = None, value_dtype: torch.dtype | None = None
) -> InverseRootResult:
    """The roots of a chunk, tested and with their statuses.

    Args:
        task: What is computed.
        A: (B, N, N) contiguous, float32 or float64. Not modified.
        out: (B, N, N) where the roots are written; those of blocks that failed are made NaN. Default: a new
            stack, whose bad blocks hold anything.
        value_dtype: The dtype of the roots, without `out`. Default: that of A.

    Returns:
        The result.
    """
    solution = task.solver.solve(A, task.root, task.config, task.epsilon)
    value = _finished(solution, out)
    num_blocks, device = A.shape[0], A.device
    damping, iterations = solution.damping, solution.iterations
    if not isinstance(damping, Tensor):
        damping = torch.full((num_blocks,), damping, dtype=A.dtype, device=device)
    if not isinstance(iterations, Tensor):
        iterations = torch.full((num_blocks,), iterations, dtype=torch.int32, device=device)
    status = solution.status
    if status is None:
        status = torch.zeros(num_blocks, dtype=torch.uint8, device=device)
    residual = solution.residual
    if task.bound is not None:
        residual = sketched_residual(A, value, task.root, damping)
        is_inaccurate = (status <= int(InverseRootStatus.MAX_ITERATIONS)) & (residual > task.bound)
        if not is_known_to_be(False, is_inaccurate):
            status = status.masked_fill(is_inaccurate, int(InverseRootStatus.INACCURATE))
    elif residual is None:
        residual = torch.full((num_blocks,), torch.nan, dtype=A.dtype, device=device)
    # The sketch of a root that is not finite is not finite, whatever the cause.
    if task.bound is None or not is_known_to_be(True, residual.isfinite()):
        status = _with_non_finite(status, A, value)
    if out is not None:
        is_void = (status >= int(InverseRootStatus.NON_FINITE_INPUT)) & (
            status <= int(InverseRootStatus.FAILED)
        )
        if not is_known_to_be(False, is_void):
            value.masked_fill_(per_block(is_void), torch.nan)
    result = InverseRootResult(value, status, iterations, residual, damping)
    if value_dtype is not None and value_dtype != value.dtype:
        result = _narrowed(result, value_dtype)
    return result


def _finished(solution: Solution, out: Tensor | None) -> Tensor:
    """scale·X, or scale·(X + Xᵀ)/2."""
    X, scale = solution.X, solution.scale
    if not solution.is_symmetric:
        X = torch.add(X, X.mT) if out is None else torch.add(X, X.mT, out=out)
        return X.mul_(0.5 if scale is None else per_block(0.5 * scale))
    if scale is not None:
        return X.mul_(per_block(scale)) if out is None else torch.mul(X, per_block(scale), out=out)
    return X if out is None else out.copy_(X)


def _with_non_finite(status: Tensor, A: Tensor, value: Tensor) -> Tensor:
    """The status, with the blocks marked whose matrix or root is not finite."""
    is_finite = finite_blocks(value)
    if is_known_to_be(True, is_finite):
        return status
    is_failed = status == int(InverseRootStatus.FAILED)
    status = status.masked_fill(~is_finite & ~is_failed, int(InverseRootStatus.NON_FINITE_RESULT))
    return status.masked_fill(~finite_blocks(A), int(InverseRootStatus.NON_FINITE_INPUT))


def _narrowed(result: InverseRootResult, dtype: torch.dtype) -> InverseRootResult:
    """The result in another dtype; roots that overflow in it are no longer usable."""
    value, status = result.value.to(dtype), result.status
    if torch.finfo(dtype).max < torch.finfo(result.value.dtype).max:
        overflows = result.is_usable & ~finite_blocks(value)
        status = status.masked_fill(overflows, int(InverseRootStatus.NON_FINITE_RESULT))
    return replace(result, value=value, status=status)


def finite_blocks(A: Tensor) -> Tensor:
    """(B,) bool: whether all entries of a block are finite."""
    if A.device.type == "cpu":
        # Sums of finite entries are finite but for overflow, and take one pass without a copy.
        is_finite = torch.isfinite(A.sum(dim=(-2, -1)))
        if bool(is_finite.all()):
            return is_finite
        return torch.isfinite(A).flatten(1).all(dim=1)
    return torch.isfinite(torch.linalg.vector_norm(A.flatten(1), ord=torch.inf, dim=1))


def is_known_to_be(value: bool, flags: Tensor) -> bool:
    """Whether all flags are `value`, or False where only a host sync could tell (not on the CPU)."""
    if flags.device.type != "cpu":
        return False
    return bool(flags.all()) if value else not bool(flags.any())
