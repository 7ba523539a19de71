"""Eigenvectors by torch.linalg.eigh: from nothing, to machine precision; the repair of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from dash_shampoo.base import EighEigendecompositionConfig
from dash_shampoo.eigenbasis.result import EigenbasisResult, can_look, is_nearly_diagonal, rotated
from dash_shampoo.inverse_root import InverseRootStatus
from dash_shampoo.inverse_root.eigen import eigh_or_bisect
from dash_shampoo.inverse_root.eigh_device import eigh_device


def eigh(A: Tensor, Q: Tensor, config: EighEigendecompositionConfig) -> EigenbasisResult:
    """A = Q·diag(λ)·Qᵀ, λ ascending, by a direct eigendecomposition of each block.

    With a tolerance above 0, a block keeps its previous Q where ‖QᵀAQ - diag‖_F is at most
    tolerance·‖QᵀAQ‖_F; its eigenvalues are then the diagonal of QᵀAQ, in their order.

    Args:
        A: (B, N, N) stack, symmetric and finite, float32 or float64.
        Q: (B, N, N) previous eigenvectors in columns; looked at with a tolerance only.
        config: `tolerance`, `retry_double_precision`, and `eigendecomposition_offload_device`.

    Returns:
        Eigenvectors and eigenvalues. FAILED where the eigendecomposition did not converge.

    Note:
        An eigendecomposition costs as much as 20 to 50 products, on a GPU with a host sync. The
        tolerance costs 2 products; on the CPU it saves the eigendecomposition of blocks that keep
        theirs, on a GPU, where looking would be a sync more, it does not.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.3; the tolerance:
        Distributed Shampoo, and Eschenhagen et al., arXiv 2506.03595.
    """
    if config.tolerance == 0.0:
        return _decompose(A, config)
    E = rotated(A, Q)
    keep = is_nearly_diagonal(E, config.tolerance)
    eigenvalues = E.diagonal(dim1=-2, dim2=-1).contiguous()
    if not can_look(A):
        new = _decompose(A, config)
        return EigenbasisResult(
            torch.where(keep[:, None, None], Q, new.eigenvectors),
            torch.where(keep[:, None], eigenvalues, new.eigenvalues),
            new.status.masked_fill(keep, int(InverseRootStatus.SUCCESS)),
        )
    eigenvectors = Q.clone()
    status = torch.zeros(A.shape[0], dtype=torch.uint8, device=A.device)
    rows = (~keep).nonzero().flatten()
    if len(rows):
        new = _decompose(A[rows], config)
        eigenvectors[rows], eigenvalues[rows] = new.eigenvectors, new.eigenvalues
        status[rows] = new.status
    return EigenbasisResult(eigenvectors, eigenvalues, status)


def _decompose(A_BNN: Tensor, config: EighEigendecompositionConfig) -> EigenbasisResult:
    """The eigendecomposition of every block, where the config wants it done."""
    there = A_BNN.to(eigh_device(A_BNN, config.eigendecomposition_offload_device))
    L_BN, Q_BNN, failed = eigh_or_bisect(there, config.retry_double_precision)
    status = torch.zeros(A_BNN.shape[0], dtype=torch.uint8, device=A_BNN.device)
    if failed:
        status[failed] = int(InverseRootStatus.FAILED)
    return EigenbasisResult(Q_BNN.to(A_BNN.device), L_BN.to(A_BNN.device), status)
