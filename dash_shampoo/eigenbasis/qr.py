"""Eigenvectors by QR iterations from the previous ones, with the base's rules."""

from __future__ import annotations

import torch
from torch import Tensor

from dash_shampoo.base import QREigendecompositionConfig
from dash_shampoo.eigenbasis.result import (
    EigenbasisResult,
    is_nearly_diagonal,
    rotated,
    sort_columns,
)
from dash_shampoo.inverse_root.blocks import can_look
from dash_shampoo.inverse_root.result import failures

# On a device, how many iterations run between two looks at whether any block still iterates.
_ITERATIONS_PER_SYNC = 8


def qr(A: Tensor, Q: Tensor, config: QREigendecompositionConfig) -> EigenbasisResult:
    """E₀ = QᵀAQ; while E is not nearly diagonal: P·R = E, E ← R·P, Q ← Q·P; then sort ascending.

    The QR algorithm without shifts, so one iteration turns column j towards eigenvector j of the
    *descending* order by λ_i/λ_j. Since the base sorts the columns ascending after every refresh,
    the next one starts from the wrong end: it tracks a drifting factor ten times worse than
    `OrthogonalIterationConfig`, and a second moment kept per column no longer fits its column.

    Args:
        A: (B, N, N) stack, symmetric and finite, float32 or float64.
        Q: (B, N, N) previous eigenvectors in columns, orthogonal.
        config: `max_iterations`, and `tolerance`: a block is done, or not touched at all, once
            ‖E - diag(E)‖_F is at most tolerance·‖E‖_F.

    Returns:
        Eigenvectors and eigenvalues, ascending, and their order.

    Note:
        2 products, and for each iteration 1 product and a QR decomposition (5 to 10 products' time
        on a CPU, a loop over the matrices on a GPU), 1 product more between iterations. On the CPU
        blocks that are done are left out; on a device they are carried along and masked, with no
        host sync in the first 8 iterations and one for every further 8.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.3; as used for Shampoo:
        Vyas et al. (SOAP), arXiv 2409.11321, and Eschenhagen et al., arXiv 2506.03595.
    """
    E = rotated(A, Q)
    L = E.diagonal(dim1=-2, dim2=-1).clone()
    if config.tolerance == 0.0 and config.max_iterations == 1:
        # Nothing but round-off could be that near to diagonal, and then the step changes nothing.
        active = torch.ones(A.shape[0], dtype=torch.bool, device=A.device)
    else:
        active = ~is_nearly_diagonal(E, config.tolerance)
    for iteration in range(config.max_iterations):
        rows = _rows_to_iterate(active, iteration)
        if rows is None:
            break
        # On the CPU the rows are those that iterate; on a device they are all, and masked.
        mask = None if can_look(A) else active[rows]
        P, R = torch.linalg.qr(E[rows])
        is_last = iteration + 1 == config.max_iterations
        if is_last:
            L = _with_rows(L, rows, (R * P.mT).sum(-1), mask)  # all that is needed of R·P
        if is_last and mask is None and isinstance(rows, slice):  # P's columns are cheaper to sort
            L, P, order = sort_columns(L, P)
            return EigenbasisResult(torch.bmm(Q, P), L, failures([], A), order)
        Q = _with_rows(Q, rows, torch.bmm(Q[rows], P), mask)
        if is_last:
            break
        E = _with_rows(E, rows, torch.bmm(R, P), mask)
        L = _with_rows(L, rows, E[rows].diagonal(dim1=-2, dim2=-1), mask)
        active[rows] &= ~is_nearly_diagonal(E[rows], config.tolerance)
    L, Q, order = sort_columns(L, Q)
    return EigenbasisResult(Q, L, failures([], A), order)


def _rows_to_iterate(active: Tensor, iteration: int) -> Tensor | slice | None:
    """The rows that take part in an iteration; None where there is none."""
    if can_look(active):
        rows = active.nonzero().flatten()
        if len(rows) == 0:
            return None
        return rows if len(rows) < len(active) else slice(None)
    if iteration % _ITERATIONS_PER_SYNC == 0 < iteration and not bool(active.any()):
        return None
    return slice(None)


def _with_rows(stack: Tensor, rows: Tensor | slice, values: Tensor, mask: Tensor | None) -> Tensor:
    """The stack with the values (K, ...) in those rows, where there is no mask or it holds."""
    if mask is not None:
        mask = mask.view(-1, *[1] * (values.dim() - 1))
        return torch.where(mask, values, stack)
    if isinstance(rows, slice):
        return values
    stack = stack.clone()
    stack[rows] = values
    return stack
