"""What an eigenbasis returns, and the small quantities that its methods share.

Shape suffixes: A_BNN is a stack of B symmetric blocks of N×N; Q_BNN holds their (approximate)
eigenvectors in columns; E_BNN = QᵀAQ; L_BN eigenvalues; keep_B one flag per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_shampoo.inverse_root.blocks import can_look
from dash_shampoo.inverse_root.result import is_usable


@dataclass(frozen=True, eq=False)
class EigenbasisResult:
    """The eigenvectors of a stack, and per block whether they can be used.

    Attributes:
        eigenvectors (Tensor): (B, N, N), in columns. A block that went wrong holds its previous
            ones, so that it can be written back as it is.
        eigenvalues (Tensor): (B, N), those of the columns; NaN for a block that went wrong.
        status (Tensor): (B,) uint8, one `InverseRootStatus` per block.
        order (Tensor | None): (B, N) int64: column j continues the previous column order[j]. What
            is kept per eigenvector (second moments) has to be gathered by it. None where every
            column continues its own, and after an eigendecomposition from nothing, which has no
            previous columns to speak of.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor
    status: Tensor
    order: Tensor | None = None

    @property
    def is_usable(self) -> Tensor:
        """(B,) bool: the blocks whose eigenvectors are new and meant to be used."""
        return is_usable(self.status)


def renewed(
    is_due: Tensor, function: Callable[[Tensor | slice], tuple[Tensor, ...]], *stacks: Tensor
) -> tuple[Tensor, ...]:
    """Stacks with some of their rows made anew.

    Args:
        is_due: (B,) bool, the rows that are.
        function: function(rows) gives new values of some rows of each stack. On the CPU it is asked for those
            that are due, on a device, where looking would wait, for all of them, which are then masked.
        *stacks: (B, ...) stacks; on the CPU they may be overwritten.

    Returns:
        As many stacks.
    """
    if not can_look(is_due):
        masks = (is_due.view(-1, *[1] * (stack.ndim - 1)) for stack in stacks)
        return tuple(map(torch.where, masks, function(slice(None)), stacks))
    rows = is_due.nonzero().flatten()
    if len(rows) == len(is_due):
        return function(slice(None))
    if len(rows) > 0:
        for stack, values in zip(stacks, function(rows), strict=True):
            stack[rows] = values
    return stacks


def rotated(A_BNN: Tensor, Q_BNN: Tensor) -> Tensor:
    """E = QᵀAQ of each block; 2 products."""
    return torch.bmm(Q_BNN.mT, torch.bmm(A_BNN, Q_BNN))


def is_nearly_diagonal(E_BNN: Tensor, tolerance: float) -> Tensor:
    """(B,) bool: ‖E - diag(E)‖_F ≤ tolerance·‖E‖_F, the base's test of a basis that is still good.

    The off-diagonal norm is the root of a difference of squares, as in the base: where round-off
    makes that negative, the answer is no.
    """
    norm = torch.linalg.vector_norm(E_BNN, dim=(-2, -1))
    diagonal_norm = torch.linalg.vector_norm(E_BNN.diagonal(dim1=-2, dim2=-1), dim=-1)
    off_diagonal_norm = (norm.square() - diagonal_norm.square()).sqrt()
    is_diagonal: Tensor = off_diagonal_norm <= tolerance * norm
    return is_diagonal


def sort_columns(L_BN: Tensor, Q_BNN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order eigenvalues and their columns, ascending; equal ones keep their order.

    Returns:
        Eigenvalues (B, N), eigenvectors (B, N, N), and the previous place (B, N) of each.
    """
    L_BN, order = L_BN.sort(dim=-1, stable=True)
    return L_BN, gather_columns(Q_BNN, order), order


def gather_columns(Q_BNN: Tensor, order_BN: Tensor) -> Tensor:
    """The columns of each block in another order, as a new stack."""
    if Q_BNN.mT.is_contiguous():  # as LAPACK has it: every column is copied at once
        starts_B = torch.arange(0, order_BN.numel(), order_BN.shape[-1], device=order_BN.device)
        rows = (order_BN + starts_B[:, None]).flatten()
        return Q_BNN.mT.flatten(0, 1).index_select(0, rows).view_as(Q_BNN).mT
    return Q_BNN.gather(-1, order_BN[:, None, :].expand_as(Q_BNN))
