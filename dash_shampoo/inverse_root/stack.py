"""Inverse roots of a stack under a cap on memory: the entry to all solvers, and what they share.

After the solver at most one pass goes over a chunk, which scales it, or two that average it with its
transpose. Values that are not finite show in the residual's sketch; only without that a pass looks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from dash_shampoo.base import EigenConfig, RootInvConfig
from dash_shampoo.inverse_root.blocks import divided, finite_blocks, is_known_to_be, per_block
from dash_shampoo.inverse_root.chunks import NO_CAP, joined, over_chunks
from dash_shampoo.inverse_root.registry import as_root, find_solver
from dash_shampoo.inverse_root.residual import residual_bound, sketch_of, sketched_residual
from dash_shampoo.inverse_root.result import (
    InverseRootResult,
    InverseRootStatus,
    StackOutcome,
    failures,
    is_usable,
)
from dash_shampoo.inverse_root.solver import Solution

Load = Callable[[slice], Tensor]
Store = Callable[[slice, Tensor, Tensor], None]

_DEFAULT_CONFIG = EigenConfig()


def solve_stack(
    load: Load,
    store: Store,
    *,
    num_matrices: int,
    size: int,
    root: int | float | Fraction,
    config: RootInvConfig,
    epsilon: float,
    dtype: torch.dtype,
    device: torch.device,
    max_workspace_bytes: int,
    residual_threshold: float | None = None,
    value_dtype: torch.dtype | None = None,
    divisor: float | Tensor = 1.0,
) -> StackOutcome:
    """A^(-1/root) of B matrices, of which only as many are in memory at once as the cap allows.

    Args:
        load: load(rows) gives the (K, N, N) matrices of consecutive rows, in `dtype`; it may be a view,
            which is not modified. Called from several threads, for rows that don't overlap.
        store: store(rows, value, usable) takes their roots (K, N, N), symmetric up to rounding, and which
            of them can be used (K,) bool; the others must not be written. Called like `load`, once for
            every row.
        num_matrices: B.
        size: N.
        root: p of A^(-1/p), positive.
        config: The solver and its options.
        epsilon: Damping, finite and at least 0.
        dtype: float32 or float64.
        device: Of the matrices.
        max_workspace_bytes: Cap on the memory taken at once, what `load` makes included; a single matrix
            is solved in any case.
        residual_threshold: As of `inverse_root`.
        value_dtype: What `store` is given; roots that overflow in it are not usable. Default: `dtype`.
        divisor: The matrices are divided by it, without a pass where the solver can do so; a number, or
            a scalar on the device. Default: 1.

    Returns:
        What became of every matrix.

    Raises:
        ValueError: As of `inverse_root`.
    """
    fraction, solver = as_root(root), find_solver(config)
    solver.check(config, fraction)
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"{epsilon=} must be finite and at least 0.")
    if residual_threshold is not None and not residual_threshold > 0.0:
        raise ValueError(f"{residual_threshold=} must be above 0, or None.")
    bound = None
    if residual_threshold is not None and solver.has_residual:
        bound = residual_bound(residual_threshold, solver.error(config, fraction), fraction)
    if num_matrices == 0 or size == 0:
        return StackOutcome(torch.zeros(num_matrices, dtype=torch.uint8, device=device), 0.0)

    def solve(rows: slice) -> StackOutcome:
        A, left = load(rows).contiguous(), divisor
        if solver.divides:
            solution = solver.solve(A, fraction, config, float(epsilon), divisor)
        else:
            A, left = divided(A, divisor), 1.0
            solution = solver.solve(A, fraction, config, float(epsilon))
        value = _finished(solution)
        outcome = _outcome_of(solution, A, left, value, fraction, bound)
        if value_dtype is not None and value_dtype != dtype:
            value, outcome = _narrowed(value, outcome, value_dtype)
        store(rows, value, is_usable(outcome.status))
        return outcome

    outcomes = over_chunks(
        solve,
        num_matrices,
        size,
        dtype=dtype,
        device=device,
        num_stacks=solver.workspace(config, fraction) + 2,  # with A and the root
        is_serial=solver.is_serial,
        max_workspace_bytes=max_workspace_bytes,
    )
    return joined(outcomes)


def inverse_root(
    A: Tensor,
    root: int | float | Fraction,
    config: RootInvConfig = _DEFAULT_CONFIG,
    epsilon: float = 0.0,
    residual_threshold: float | None = None,
) -> InverseRootResult:
    """A^(-1/root) for each block of a stack, by the solver of the config.

    Every block is solved on its own: a block that holds NaN, or on which the solver fails, leaves
    the others bit-identical, and is reported in `status` instead of by an exception.

    Args:
        A: (B, N, N) stack, (..., N, N), or one (N, N) matrix: symmetric positive semi-definite up
            to rounding. float32 or float64; bf16 and fp16 are computed and returned in float32.
            Not modified.
        root: p of A^(-1/p), positive: 2 gives the inverse square root. A float may be a fraction
            such as 1/0.3, with solvers that accept it.
        config: The solver and its options. Default: `EigenConfig()`.
        epsilon: Damping: epsilon·I is added to A, as the solver's own formula says. Default: 0.
        residual_threshold: Test every root by its `sketched_residual`, and give those above this, or
            above what the solver's own stated error explains, the status INACCURATE; 0.3 is a good
            value. `eigen` is not tested. Default: no test.

    Returns:
        The roots in the shape of `A`, symmetric up to rounding, and per block the status, iterations
        and residual.

    Raises:
        ValueError: If the shape, dtype, root or epsilon is not one of the above, if no solver
            takes the config, or the solver can't do the root.

    Note:
        Solvers with a fixed number of steps don't synchronise with the host; those with a
        stopping rule do once per step, `eigen` inside the eigendecomposition. Nothing depends on
        autocast, the default device and dtype, or torch's precision settings.

    Examples:
        >>> A = torch.diag(torch.tensor([4.0, 16.0])).expand(3, 2, 2)
        >>> result = inverse_root(A, root=2)
        >>> result.value[0].diagonal().tolist(), result.status.tolist()
        ([0.5, 0.25], [0, 0, 0])
    """
    stack = _as_stack(A)
    values: dict[int, Tensor] = {}
    outcome = solve_stack(
        lambda rows: stack[rows],
        lambda rows, value, usable: values.update({rows.start: value}),
        num_matrices=stack.shape[0],
        size=stack.shape[-1],
        root=root,
        config=config,
        epsilon=epsilon,
        dtype=stack.dtype,
        device=stack.device,
        max_workspace_bytes=NO_CAP,
        residual_threshold=residual_threshold,
    )
    parts = [values[start] for start in sorted(values)] or [torch.empty_like(stack)]
    value = parts[0] if len(parts) == 1 else torch.cat(parts)
    is_void = (outcome.status >= int(InverseRootStatus.NON_FINITE_INPUT)) & (
        outcome.status <= int(InverseRootStatus.FAILED)
    )
    if not is_known_to_be(False, is_void):
        value.masked_fill_(per_block(is_void), torch.nan)
    return outcome.result(value.reshape(A.shape), stack.dtype)


def _as_stack(A: Tensor) -> Tensor:
    """Check the input and see it as a contiguous (B, N, N) stack in the compute dtype."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be a stack of square matrices (..., N, N), not {tuple(A.shape)}.")
    if not A.dtype.is_floating_point:
        raise ValueError(f"A must be of a floating-point dtype, not {A.dtype}.")
    A = A.detach()
    if A.dtype not in (torch.float32, torch.float64):
        A = A.float()
    size = A.shape[-1]
    num_blocks = A.shape[:-2].numel()
    return A.reshape(num_blocks, size, size).contiguous()


def _finished(solution: Solution) -> Tensor:
    """scale·X, or scale·(X + Xᵀ)/2."""
    X, scale = solution.X, solution.scale
    if not solution.is_symmetric:
        X = torch.add(X, X.mT)
        return X.mul_(0.5 if scale is None else per_block(0.5 * scale))
    return X if scale is None else X.mul_(per_block(scale))


def _outcome_of(
    solution: Solution,
    A: Tensor,
    divisor: float | Tensor,
    value: Tensor,
    root: Fraction,
    bound: float | None,
) -> StackOutcome:
    """What became of a chunk whose roots are `value`, those of A/divisor.

    Args:
        solution: Of the solver.
        A: (B, N, N) chunk.
        divisor: A number, or a scalar on the device.
        value: (B, N, N) the roots.
        root: p.
        bound: The residual above which a root is bad; None tests none.

    Returns:
        The outcome.
    """
    status, residual, sketch = solution.status, solution.residual, value
    if bound is not None:
        sketch = sketch_of(value)
        residual = sketched_residual(A, value, root, solution.damping, sketch, divisor)
        is_inaccurate = residual > bound
        if not is_known_to_be(False, is_inaccurate):
            status = _with_inaccurate(status, is_inaccurate)
    # The sketch of a root that is not finite is not finite, whatever the cause.
    if bound is None or residual is None or not is_known_to_be(True, residual.isfinite()):
        status = _with_non_finite(status, A, sketch, solution.size)
    return StackOutcome(
        failures([], A) if status is None else status,
        solution.damping,
        solution.iterations,
        torch.nan if residual is None else residual,
    )


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


def _narrowed(
    value: Tensor, outcome: StackOutcome, dtype: torch.dtype
) -> tuple[Tensor, StackOutcome]:
    """The roots in another dtype; those that overflow in it are no longer usable."""
    narrow, status = value.to(dtype), outcome.status
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        overflows = is_usable(status) & ~finite_blocks(narrow)
        status = status.masked_fill(overflows, int(InverseRootStatus.NON_FINITE_RESULT))
    return narrow, replace(outcome, status=status)
