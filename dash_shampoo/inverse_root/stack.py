"""Inverse roots of a stack under a cap on memory: the entry to all solvers, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base import EigenConfig, RootInvConfig
from dash_shampoo.inverse_root.chunks import map_chunks, plan_chunks
from dash_shampoo.inverse_root.result import InverseRootResult, StackOutcome, is_usable
from dash_shampoo.inverse_root.task import Task, solve_chunk
from dash_shampoo.products import exact_products

Load = Callable[[slice], Tensor]
Store = Callable[[slice, Tensor, Tensor], None]

_DEFAULT_CONFIG = EigenConfig()
_NO_CAP = 2**62


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
    task = Task.of(config, root, epsilon, residual_threshold)
    value_dtype = dtype if value_dtype is None else value_dtype

    def solve(rows: slice) -> StackOutcome:
        A = load(rows).contiguous()
        value, outcome = solve_chunk(task, A, value_dtype=value_dtype, divisor=divisor)
        store(rows, value, is_usable(outcome.status))
        return outcome

    return _over_chunks(solve, task, num_matrices, size, dtype, device, max_workspace_bytes)


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
    task = Task.of(config, root, epsilon, residual_threshold)
    stack = _as_stack(A)
    value = torch.empty_like(stack)

    def solve(rows: slice) -> StackOutcome:
        return solve_chunk(task, stack[rows], out=value[rows])[1]

    num_matrices, size, _ = stack.shape
    outcome = _over_chunks(solve, task, num_matrices, size, stack.dtype, stack.device, _NO_CAP)
    return outcome.result(value.reshape(A.shape), stack.dtype)


def _over_chunks(
    solve: Callable[[slice], StackOutcome],
    task: Task,
    num_matrices: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_workspace_bytes: int,
) -> StackOutcome:
    """Solve the chunks of a stack, and join what became of them."""
    if num_matrices == 0 or size == 0:
        status = torch.zeros(num_matrices, dtype=torch.uint8, device=device)
        return StackOutcome(status, 0.0, 0, torch.nan)
    chunks = plan_chunks(
        num_matrices,
        size,
        itemsize=dtype.itemsize,
        num_stacks=task.num_stacks,
        device_type=device.type,
        is_serial=task.solver.is_serial,
        max_workspace_bytes=max_workspace_bytes,
        num_threads=torch.get_num_threads(),
    )
    # Autocast would take the products of a step inside it down to half precision, unasked.
    can_autocast = torch.amp.is_autocast_available(device.type)
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False) if can_autocast else contextlib.nullcontext(),
        exact_products(device, size**3),
    ):
        outcomes = map_chunks(solve, chunks)
    return StackOutcome.joined(outcomes)


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
