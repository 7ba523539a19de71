"""Inverse roots of a stack that the caller loads and stores piece by piece, under a cap on memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.config import EigenConfig, RootInvConfig
from dash_shampoo.inverse_root.dispatch import inverse_root
from dash_shampoo.inverse_root.result import InverseRootResult, InverseRootStatus

Load = Callable[[slice], Tensor]
Store = Callable[[slice, Tensor, Tensor], None]

# Stacks that a solver holds at its peak, input and output included.
_STACKS = 20


@dataclass(frozen=True, eq=False)
class StackOutcome:
    """What became of every matrix of a stack.

    Attributes:
        status (Tensor): (B,) uint8, one `InverseRootStatus` per matrix.
        damping (Tensor): (B,) what was added to the diagonals: the roots are those of A + damping·I.
    """

    status: Tensor
    damping: Tensor


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
) -> StackOutcome:
    """A^(-1/root) of B matrices, of which only as many are in memory at once as the cap allows.

    Args:
        load: load(rows) gives the (K, N, N) matrices of consecutive rows, in `dtype`; it may be a view,
            which is not modified. Called from several threads, for rows that don't overlap.
        store: store(rows, value, usable) takes their roots (K, N, N), symmetric, and which of them can be
            used (K,) bool; the others must not be written. Called like `load`, once for every row.
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

    Returns:
        Status and damping of every matrix.

    Raises:
        ValueError: As of `inverse_root`.
    """
    value_dtype = value_dtype or dtype
    if num_matrices == 0 or size == 0:
        zeros = torch.zeros(num_matrices, device=device)
        return StackOutcome(zeros.to(torch.uint8), zeros.to(dtype))
    per_row = size**2 * dtype.itemsize * _STACKS
    num_rows = max(1, max_workspace_bytes // per_row)
    statuses, dampings = [], []
    for start in range(0, num_matrices, num_rows):
        rows = slice(start, min(start + num_rows, num_matrices))
        result = inverse_root(load(rows), root, config, epsilon, residual_threshold)
        value, status = result.value.to(value_dtype), result.status
        if torch.finfo(value_dtype).max < torch.finfo(dtype).max:
            overflows = result.is_usable & ~value.isfinite().flatten(1).all(1)
            status = status.masked_fill(overflows, int(InverseRootStatus.NON_FINITE_RESULT))
        store(rows, value, status <= int(InverseRootStatus.MAX_ITERATIONS))
        statuses.append(status)
        dampings.append(result.damping)
    return StackOutcome(torch.cat(statuses), torch.cat(dampings))


def repair(
    A: Tensor, root: int | float | Fraction, config: RootInvConfig, epsilon: float, damping: Tensor
) -> InverseRootResult:
    """Roots of matrices on which the solver failed: by more damping, else by clamped eigenvalues.

    Args:
        A: (B, N, N) the matrices; few.
        root: p of A^(-1/p).
        config: The solver that failed.
        epsilon: The damping that it was given.
        damping: (B,) the damping that it aimed at.

    Returns:
        Roots of (A + damping·I) with the negative eigenvalues of A taken as 0, their largest eigenvalue at
        most damping^(-1/p). FAILED or NON_FINITE_INPUT where nothing helps.
    """
    del config
    shifted = A.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_((damping - epsilon)[:, None])
    result = inverse_root(shifted, root, EigenConfig(), epsilon)
    return replace(result, damping=damping)
