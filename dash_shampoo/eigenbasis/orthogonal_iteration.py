"""Orthogonal iteration from the previous eigenvectors: the basis that tracks a drifting factor.

Shape suffixes: A_BNN is a stack of B blocks of N×N; Q_BNN orthonormal columns; E_BNN = QᵀAQ;
K_BNN antisymmetric; L_BN eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dash_shampoo.base import EigendecompositionConfig
from dash_shampoo.eigenbasis.orthogonality import cholesky_qr, restore_orthogonality
from dash_shampoo.eigenbasis.result import (
    EigenbasisResult,
    gather_columns,
    is_nearly_diagonal,
    rotated,
    sort_columns,
)
from dash_shampoo.inverse_root.fields import (
    check_choice,
    check_field,
    check_positive_int,
    is_number,
)
from dash_shampoo.inverse_root.residual import norm_from_below

Orthogonalization = Literal["rotation", "cholesky_qr", "householder"]

# Eigenvalues below this share of the largest are noise of the products in single precision; what
# they say of directions is not followed.
_FLOOR = 1e-5
# Bound of ‖K‖₂ up to which I + K + b·K² is near enough to orthogonal.
_LARGEST_ROTATION = 0.5
# Bound of a row of K: columns that are all noise must not keep the others from turning.
_LARGEST_ROW = 0.5
# Refreshes from the start on that are early ones.
_EARLY_REFRESHES = 10
# A difference of reciprocals, this much larger than they are, is its sign.
_STEEP = 1e6


@dataclass(kw_only=True)
class OrthogonalIterationConfig(EigendecompositionConfig):
    """Orthogonal iteration from the previous eigenvectors, by products and at most one factorisation.

    Every column stays what it was (no sorting), so that a second moment kept per column goes on to
    fit its column. Choose this for SOAP: refreshed every step it is as close to the true
    eigenvectors as QR iterations in descending order, and 5 to 10 times closer than the base's
    `QREigendecompositionConfig`, at less than half its cost.

    It follows a basis and does not find one. `eigenbasis` takes blocks that have none yet, or have
    lost theirs, by an eigendecomposition.

    Attributes:
        num_iterations (int): Iterations of a refresh, at least 1. (Default: 1)
        num_early_iterations (int): Iterations of each of the first ten refreshes, where that is more: while
            a training begins, gradients turn faster than one iteration follows where bases are refreshed
            seldom. (Default: 4)
        orthogonalization (str): How Q stays orthogonal. "rotation": a first-order orthogonal
            iteration, Q ← Q·(I + K + b·K²), by 4 products and no factorisation. "cholesky_qr":
            A·Q orthonormalised by two Cholesky decompositions. "householder": by
            `torch.linalg.qr`, the iteration of the SOAP paper. (Default: "rotation")
        use_sorting (bool): Whether the columns are sorted by eigenvalue, ascending as in the base.
            (Default: False)
        orthogonality_tolerance (float): Q is taken one step of Newton-Schulz nearer to orthogonal
            where a sketched ‖QᵀQ - I‖ is above this. Positive. (Default: 0.005)
    """

    num_iterations: int = 1
    num_early_iterations: int = 4
    orthogonalization: Orthogonalization = "rotation"
    use_sorting: bool = False
    orthogonality_tolerance: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int(self, "num_iterations")
        check_positive_int(self, "num_early_iterations")
        check_choice(self, "orthogonalization", Orthogonalization)
        is_tolerance = (
            is_number(self.orthogonality_tolerance) and self.orthogonality_tolerance > 0.0
        )
        check_field(self, "orthogonality_tolerance", is_tolerance, "positive and finite")

    def at(self, refreshes: int) -> OrthogonalIterationConfig:
        """What is to be done in one refresh of many.

        Args:
            refreshes: How many there were before.

        Returns:
            This config, early on with as many iterations as it then wants.
        """
        if refreshes >= _EARLY_REFRESHES or self.num_early_iterations <= self.num_iterations:
            return self
        return replace(self, num_iterations=self.num_early_iterations)


def orthogonal_iteration(
    A: Tensor, Q: Tensor, config: OrthogonalIterationConfig
) -> EigenbasisResult:
    """Q ← orthonormalised A·Q, column by column in descending order of qⱼᵀAqⱼ.

    One iteration shrinks the part of column j that points along eigenvector i by
    min(λ_i, λ_j)/max(λ_i, λ_j). Written in the previous basis, E = QᵀAQ, it is to first order the
    rotation

        K_ij = E_ij·sign(E_jj - E_ii)/max(E_ii, E_jj)

    (a Jacobi rotation has the difference in place of the maximum, which turns eigenvectors of close
    eigenvalues into one another at every noise). Q·(I + K + b·K²) with b = 1/2 + μ/8 + μ²/16 and
    μ = ‖K²‖_F²/‖K‖_F², about the largest squared angle, is orthogonal up to b²·max m(m - μ) over the
    squared angles m: exactly so for a single one, where b = 1/2 would leave m²/4. Rows of K
    are shortened to a length of 0.5, then K to a norm of 0.5, by two power steps with K²; a block that
    drifts further in a refresh than that follows over several.

    "cholesky_qr" and "householder" do it exactly, for A + 1e-5·λ_max·I and in the descending order, and
    put the columns back into their places.

    Args:
        A: (B, N, N) stack, symmetric positive semi-definite up to rounding, finite.
        Q: (B, N, N) previous eigenvectors in columns, nearly orthogonal.
        config: Iterations and orthogonalisation; with `tolerance` above 0, blocks whose
            ‖E - diag(E)‖_F is at most tolerance·‖E‖_F keep their Q.

    Returns:
        Eigenvectors, with the eigenvalues diag(QᵀAQ) of the *previous* basis where it is a rotation
        or has not moved, to first order those of the new one. FAILED where Q was too far from
        orthogonal to be repaired, or a Cholesky decomposition failed.

    Note:
        Products of an iteration: "rotation" 4 (K² symmetric) and 12 passes over the stack;
        "cholesky_qr" 4 (two symmetric), two Cholesky decompositions and two triangular solves;
        "householder" 1 and a QR decomposition; with a tolerance 2 more for these two. The sketched
        test costs 16/N of a product, a step of Newton-Schulz 2: on the CPU for the blocks that need
        it, on a device for all, masked. No host sync.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.2 (orthogonal iteration);
        Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci. Comput. 42 (2020).

    Examples:
        >>> A = torch.diag(torch.tensor([4.0, 1.0]))[None]
        >>> angle = torch.tensor(0.1)
        >>> Q = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(1, 2, 2)
        >>> for _ in range(4):
        ...     Q = orthogonal_iteration(A, Q, OrthogonalIterationConfig()).eigenvectors
        >>> float(Q[0, 0, 1].abs()) < 1e-3
        True
    """
    order = None
    L = None
    for _ in range(config.num_iterations):
        if config.orthogonalization == "rotation":
            Q, L = _rotate(A, Q, config.tolerance)
        else:
            Q, L = _power_step(A, Q, config)
    assert L is not None
    Q, status = restore_orthogonality(Q, config.orthogonality_tolerance)
    if config.use_sorting:
        L, Q, order = sort_columns(L, Q)
    return EigenbasisResult(Q, L, status, order)


def _rotate(A_BNN: Tensor, Q_BNN: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Q·(I + K + b·K²), and the eigenvalues diag(QᵀAQ) of the Q that came in."""
    E_BNN = rotated(A_BNN, Q_BNN)
    eigenvalues_BN = E_BNN.diagonal(dim1=-2, dim2=-1).clone()
    keep_B = is_nearly_diagonal(E_BNN, tolerance) if tolerance > 0.0 else None
    K_BNN = E_BNN.mul_(_signed_weights(eigenvalues_BN))
    K_BNN.diagonal(dim1=-2, dim2=-1).zero_()
    share_BN = (_LARGEST_ROW / torch.linalg.vector_norm(K_BNN, dim=-1)).clamp_max_(1.0)
    K_BNN.mul_(torch.minimum(share_BN[:, :, None], share_BN[:, None, :]))
    square_BNN = torch.bmm(K_BNN, K_BNN)
    shrink_B = (_LARGEST_ROTATION / norm_from_below(square_BNN).sqrt()).clamp_max_(1.0)
    if keep_B is not None:
        shrink_B = shrink_B.masked_fill(keep_B, 0.0)
    # ‖K‖_F² is -tr K², but for round-off where K is nothing else.
    norm_B = square_BNN.diagonal(dim1=-2, dim2=-1).sum(-1).neg_()
    norm_B = norm_B.clamp_min_(torch.finfo(norm_B.dtype).tiny).sqrt_()
    mu_B = torch.linalg.vector_norm(square_BNN, dim=(-2, -1)).mul_(shrink_B).div_(norm_B)
    mu_B = mu_B.square_().clamp_max_(1.0)
    b_B = (0.0625 * mu_B + 0.125) * mu_B + 0.5
    R_BNN = K_BNN.mul_(shrink_B[:, None, None])
    R_BNN.addcmul_(square_BNN, (b_B * shrink_B.square())[:, None, None])
    R_BNN.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return torch.bmm(Q_BNN, R_BNN), eigenvalues_BN


def _signed_weights(L_BN: Tensor) -> Tensor:
    """W_ij = sign(λ_j - λ_i)/max(λ_i, λ_j) with λ floored at a small share of λ_max, antisymmetric."""
    size = L_BN.shape[-1]
    largest = L_BN.amax(-1, keepdim=True).clamp_min(torch.finfo(L_BN.dtype).tiny)
    # The floor rises with the index, so that eigenvalues that are all noise are never equal.
    ramp = torch.arange(size, dtype=L_BN.dtype, device=L_BN.device).div_(size).add_(1.0)
    reciprocal = (L_BN.clamp_min(0.0) + _FLOOR * ramp * largest).reciprocal_()
    i, j = reciprocal[:, :, None], reciprocal[:, None, :]
    # j where i > j, else -i, without a branch per entry, which on a CPU costs more than a product.
    return (i - j).mul_(_STEEP).clamp_(-i, j)


def _power_step(
    A_BNN: Tensor, Q_BNN: Tensor, config: OrthogonalIterationConfig
) -> tuple[Tensor, Tensor]:
    """A·Q, orthonormalised in descending order of its eigenvalues, and these eigenvalues."""
    Y_BNN = torch.bmm(A_BNN, Q_BNN)
    L_BN = (Q_BNN * Y_BNN).sum(-2)
    # A + floor·λ_max·I: what A maps to noise keeps its direction, instead of a new one every time.
    Y_BNN.addcmul_(Q_BNN, (_FLOOR * L_BN.amax(-1).clamp_min(0.0))[:, None, None])
    order_BN = L_BN.argsort(dim=-1, descending=True, stable=True)
    Y_BNN = gather_columns(Y_BNN, order_BN)
    is_householder = config.orthogonalization == "householder"
    P_BNN = torch.linalg.qr(Y_BNN).Q if is_householder else cholesky_qr(Y_BNN)
    P_BNN = gather_columns(P_BNN, order_BN.argsort(dim=-1))
    # A decomposition is unique up to the columns' signs: they go on in the direction they had.
    P_BNN *= torch.where((P_BNN * Q_BNN).sum(-2, keepdim=True) < 0.0, -1.0, 1.0)
    if config.tolerance > 0.0:
        keep_B = is_nearly_diagonal(torch.bmm(Q_BNN.mT, torch.bmm(A_BNN, Q_BNN)), config.tolerance)
        P_BNN = torch.where(keep_B[:, None, None], Q_BNN, P_BNN)
    return P_BNN, L_BN
