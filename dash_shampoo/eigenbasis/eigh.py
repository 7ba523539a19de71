"""Eigenvectors by torch.linalg.eigh: from nothing, to machine precision; the repair of all others."""

from __future__ import annotations

from torch import Tensor

from dash_shampoo.base import EighEigendecompositionConfig
from dash_shampoo.eigenbasis.result import EigenbasisResult, is_nearly_diagonal, renewed, rotated
from dash_shampoo.inverse_root.blocks import can_look
from dash_shampoo.inverse_root.eigen import decompose
from dash_shampoo.inverse_root.result import failures


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

    def decomposed(rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        L_BN, V_BNN, failed = decompose(A[rows], config)
        return V_BNN.mT, L_BN, failures(failed, V_BNN)

    if config.tolerance == 0.0:
        return EigenbasisResult(*decomposed(slice(None)))
    E = rotated(A, Q)
    eigenvalues = E.diagonal(dim1=-2, dim2=-1).contiguous()
    is_off = ~is_nearly_diagonal(E, config.tolerance)
    kept = Q.clone() if can_look(Q) else Q
    return EigenbasisResult(*renewed(is_off, decomposed, kept, eigenvalues, failures([], A)))
