"""Slow, plain reference in float64, block by block. Imports nothing of the package."""

from __future__ import annotations

import torch
from torch import Tensor


def off_diagonal_share(E: Tensor) -> float:
    """‖E - diag(E)‖_F / ‖E‖_F of one matrix."""
    return float(torch.linalg.norm(E - E.diag().diag()) / torch.linalg.norm(E))


def reference_qr_algorithm(
    A: Tensor, Q: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """QR iterations on QᵀAQ of one matrix until it is nearly diagonal; ascending."""
    Q = Q.double().clone()
    for _ in range(max_iterations):
        E = Q.T @ A.double() @ Q
        if off_diagonal_share(E) <= tolerance:
            break
        Q = Q @ torch.linalg.qr(E)[0]
    eigenvalues = (Q.T @ A.double() @ Q).diag()
    order = eigenvalues.argsort(stable=True)
    return eigenvalues[order], Q[:, order]


def reference_orthogonal_iteration(A: Tensor, Q: Tensor) -> Tensor:
    """Gram-Schmidt of the columns of A·Q in descending order of qᵀAq, each left in its place."""
    A, Q = A.double(), Q.double()
    Y = A @ Q
    columns: dict[int, Tensor] = {}
    for j in (Q * Y).sum(0).argsort(descending=True).tolist():
        y = Y[:, j]
        for _ in range(2):  # twice is enough
            for other in columns.values():
                y = y - other * (other @ y)
        columns[j] = y / y.norm()
    return torch.stack([columns[j] for j in range(len(columns))], dim=1)


def residual_correlation(A: Tensor, Q: Tensor, floor: float = 1e-5) -> Tensor:
    """(B,) root mean square of E_ij/√(E_ii E_jj), i ≠ j, of E = QᵀAQ; 0 for eigenvectors."""
    E = Q.double().mT @ A.double() @ Q.double()
    d = E.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    d = d + floor * d.amax(-1, keepdim=True)
    correlation = E / (d[:, :, None] * d[:, None, :]).sqrt()
    correlation.diagonal(dim1=-2, dim2=-1).zero_()
    size = E.shape[-1]
    return (correlation.square().sum(dim=(-2, -1)) / max(size * (size - 1), 1)).sqrt()
