"""Inverse root by eigendecomposition: any root, any condition number, the reference for the others.

Shape suffixes: A_BNN is a stack of B blocks of N×N; L_BN eigenvalues in ascending order; V_BNN
eigenvectors in rows, A = Vᵀ·diag(L)·V.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from dash_shampoo.base import (
    EigenConfig,
    PerturbationConfig,
    PseudoInverseConfig,
    RankDeficientStabilityConfig,
)
from dash_shampoo.inverse_root.blocks import damped, per_block, power
from dash_shampoo.inverse_root.chunks import map_chunks, plan_chunks
from dash_shampoo.inverse_root.eigh_device import eigh_device
from dash_shampoo.inverse_root.fields import check_choice
from dash_shampoo.inverse_root.result import InverseRootStatus, Solution
from dash_shampoo.inverse_root.solver import Solver
from dash_shampoo.products import Products

logger = logging.getLogger(__name__)


SpectrumRepair = Literal["shampoo", "abs", "abs_add", "relu"]


@dataclass(kw_only=True)
class SpectrumRepairConfig(RankDeficientStabilityConfig):
    """The four repairs of the spectrum λ of A + εI that DASH offers with `eigen`.

    - "shampoo": λ - min(λ_min, 0) + ε
    - "abs": abs(λ - ε)
    - "abs_add": abs(λ - ε) + ε
    - "relu": λ - ε where that is positive and at least ε; the other directions are dropped
      (their inverse root is 0), so the result has low rank.

    Choose this to compare with DASH; `PerturbationConfig`, the base's default, serves otherwise.
    Given as ``EigenConfig(rank_deficient_stability_config=SpectrumRepairConfig(method="abs"))``.

    Attributes:
        method (str): One of the four above. (Default: "shampoo")
    """

    method: SpectrumRepair = "shampoo"

    def __post_init__(self) -> None:
        check_choice(self, "method", SpectrumRepair)


def check(config: EigenConfig, root: Fraction) -> None:
    """Refuse a repair of the spectrum that is not known here.

    Args:
        config: Its `rank_deficient_stability_config` is looked at.
        root: Unused; part of the signature of every check.

    Raises:
        ValueError: If the repair is none of those that `eigen` knows.
    """
    repair = config.rank_deficient_stability_config
    if not isinstance(repair, (PerturbationConfig, PseudoInverseConfig, SpectrumRepairConfig)):
        raise ValueError(
            f"rank_deficient_stability_config={repair!r} is not known to eigen; it takes "
            "PerturbationConfig, PseudoInverseConfig and SpectrumRepairConfig."
        )


def eigen(A: Tensor, root: Fraction, config: EigenConfig, epsilon: float) -> Solution:
    """A^(-1/p) = Q·diag(f(λ))·Qᵀ with A = Q·diag(λ)·Qᵀ and f(λ) = λ^(-1/p) after a repair of λ.

    The repair is that of `rank_deficient_stability_config`:

    - `PerturbationConfig` (the base's): the eigenvalues of A + εI; where λ_min < ε, all are shifted
      so that the smallest is ε. With ``perturb_before_computation=False`` those of A, shifted by
      -min(λ_min, 0) + ε.
    - `PseudoInverseConfig` (the base's): λ at or below max(rank_rtol·λ_max, rank_atol) gives 0.
    - `SpectrumRepairConfig`: one of DASH's four.

    Works for every root and condition number, up to the precision of the eigenvalues: absolute
    errors of about machine epsilon times λ_max in λ, so with ε = 0 the smallest are noise.

    Args:
        A: (B, N, N) stack, finite, float32 or float64. Not modified.
        root: p, any positive number.
        config: The repair, `retry_double_precision` for blocks on which the eigendecomposition
            does not converge, and `eigendecomposition_offload_device`.
        epsilon: ε, at least 0; 0 with the pseudo-inverse.

    Returns:
        Roots, symmetric up to rounding. Status FAILED where the eigendecomposition did not converge.

    Raises:
        ValueError: If `epsilon` is not 0 with the pseudo-inverse.

    Note:
        1 matmul beside the eigendecomposition, which costs as much as 20 to 50. On a GPU it
        synchronises with the host.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.3 and 9.4; the repairs:
        Distributed Shampoo (arXiv 2309.06497, section 3.2) and DASH (arXiv 2602.02016).

    Examples:
        >>> A = torch.diag(torch.tensor([8.0, 27.0], dtype=torch.float64))[None]
        >>> [round(x, 6) for x in eigen(A, Fraction(3), EigenConfig(), 0.0).X[0].diagonal().tolist()]
        [0.5, 0.333333]
    """
    repair = config.rank_deficient_stability_config
    if isinstance(repair, PseudoInverseConfig) and epsilon != 0.0:
        raise ValueError(f"{epsilon=} must be 0.0 with PseudoInverseConfig.")
    is_damped_before = isinstance(repair, SpectrumRepairConfig) or (
        isinstance(repair, PerturbationConfig) and repair.perturb_before_computation
    )
    # In the matrix rather than in its eigenvalues, which rounds differently: as the base does.
    L_BN, V_BNN, failed = decompose(damped(A, epsilon) if is_damped_before else A, config)
    inv_power_BN = inverse_power(L_BN, float(root), epsilon, config)
    # A repair may drop NaN like any eigenvalue that is not above a cutoff.
    inv_power_BN = torch.where(L_BN.isfinite(), inv_power_BN, torch.nan)
    X = Products("fp32")((V_BNN * inv_power_BN[:, :, None]).mT, V_BNN)
    status = None
    if failed:
        status = torch.zeros(A.shape[0], dtype=torch.uint8, device=A.device)
        status[failed] = int(InverseRootStatus.FAILED)
    return Solution(X, damping=epsilon, is_symmetric=True, status=status)


def inverse_power(L_BN: Tensor, root: float, epsilon: float, config: EigenConfig) -> Tensor:
    """f(λ) = λ^(-1/root) of the repaired eigenvalues, (B, N); no block looks at another."""
    exponent = -1.0 / root
    match config.rank_deficient_stability_config:
        case PseudoInverseConfig() as repair:
            rtol = repair.rank_rtol
            if rtol is None:
                rtol = L_BN.shape[-1] * torch.finfo(L_BN.dtype).eps
            largest = L_BN.amax(dim=-1, keepdim=True)
            cutoff = torch.clamp(rtol * largest.relu(), min=repair.rank_atol)
            return torch.where(cutoff >= L_BN, torch.zeros_like(L_BN), power(L_BN, exponent))
        case PerturbationConfig() as repair:
            smallest = L_BN.amin(dim=-1, keepdim=True)
            if repair.perturb_before_computation:
                # Compared in float64, as the base compares Python numbers.
                is_too_small = smallest.double() < epsilon
                L_BN = torch.where(is_too_small, (L_BN - smallest) + epsilon, L_BN)
            else:
                L_BN = (L_BN - smallest.clamp_max(0.0)) + epsilon
            return power(L_BN, exponent)
        case SpectrumRepairConfig() as repair:
            return _repaired_inverse_power(L_BN, exponent, epsilon, repair)
        case unknown:
            raise ValueError(f"rank_deficient_stability_config={unknown!r} is not known to eigen.")


def _repaired_inverse_power(
    L_BN: Tensor, exponent: float, epsilon: float, repair: SpectrumRepairConfig
) -> Tensor:
    """DASH's repairs of the eigenvalues of A + εI, to the power `exponent`."""
    match repair.method:
        case "shampoo":
            L_BN = (L_BN - L_BN.amin(dim=-1, keepdim=True).clamp_max(0.0)) + epsilon
        case "abs":
            L_BN = (L_BN - epsilon).abs()
        case "abs_add":
            L_BN = (L_BN - epsilon).abs() + epsilon
        case "relu":
            shifted = L_BN - epsilon
            is_kept = (shifted >= epsilon) & (shifted > 0.0)
            return torch.where(is_kept, power(shifted, exponent), torch.zeros_like(L_BN))
    return power(L_BN, exponent)


def decompose(A_BNN: Tensor, config: EigenConfig) -> tuple[Tensor, Tensor, list[int]]:
    """Decompose A = Vᵀ·diag(L)·V.

    Args:
        A_BNN: (B, N, N) stack.
        config: Retry and offload device.

    Returns:
        Eigenvalues (B, N), eigenvectors in rows (B, N, N), and the rows that failed.
    """
    there = A_BNN.to(eigh_device(A_BNN, config.eigendecomposition_offload_device))
    if there.device.type == "cpu" and A_BNN.device.type != "cpu":
        L_BN, Q_BNN, failed = _eigh_on_threads(there, config.retry_double_precision)
    else:  # a stack that is on the CPU was cut into chunks before it came here
        L_BN, Q_BNN, failed = _eigh_of_finite(there, config.retry_double_precision)
    # LAPACK and cuSOLVER leave the eigenvectors in columns of column-major memory: this is a view.
    V_BNN = Q_BNN.mT.contiguous()
    return L_BN.to(A_BNN.device), V_BNN.to(A_BNN.device), failed


def _eigh_on_threads(
    A_BNN: Tensor, retry_double_precision: bool
) -> tuple[Tensor, Tensor, list[int]]:
    """`_eigh_of_finite` of chunks of a stack on the CPU, on several threads."""
    num_blocks, size, _ = A_BNN.shape
    chunks = plan_chunks(
        num_blocks,
        size,
        itemsize=A_BNN.element_size(),
        num_stacks=3,
        device_type="cpu",
        is_serial=True,
        max_workspace_bytes=2**62,
        num_threads=torch.get_num_threads(),
    )
    parts = map_chunks(lambda rows: _eigh_of_finite(A_BNN[rows], retry_double_precision), chunks)
    failed = [
        rows.start + row for rows, part in zip(chunks.rows, parts, strict=True) for row in part[2]
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), failed


def _eigh_of_finite(
    A_BNN: Tensor, retry_double_precision: bool
) -> tuple[Tensor, Tensor, list[int]]:
    """`eigh_or_bisect`; blocks that are not finite get NaN and don't stop the others."""
    is_finite = torch.isfinite(A_BNN.sum(dim=(-2, -1)))
    if bool(is_finite.all()):
        return eigh_or_bisect(A_BNN, retry_double_precision)
    is_finite = torch.isfinite(A_BNN).flatten(1).all(dim=1)
    identity = torch.eye(A_BNN.shape[-1], dtype=A_BNN.dtype, device=A_BNN.device)
    clean = torch.where(per_block(is_finite), A_BNN, identity)
    L_BN, Q_BNN, failed = eigh_or_bisect(clean, retry_double_precision)
    return L_BN.masked_fill(~is_finite[:, None], torch.nan), Q_BNN, failed


def eigh_or_bisect(A_BNN: Tensor, retry_double_precision: bool) -> tuple[Tensor, Tensor, list[int]]:
    """torch.linalg.eigh of a stack; where it raises, of its halves, down to single blocks.

    torch raises for the whole stack when one block does not converge. Halving leaves the others'
    results untouched and costs a failing block 2·log2(B) further calls.

    Returns:
        Eigenvalues, eigenvectors, and the rows that failed (given the decomposition of I).
    """
    try:
        L, Q = torch.linalg.eigh(A_BNN)
        return L, Q, []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # LinAlgError is one, and so are the failures of cuSOLVER
        num_blocks = A_BNN.shape[0]
        if num_blocks > 1:
            half = num_blocks // 2
            L_0, Q_0, failed_0 = eigh_or_bisect(A_BNN[:half], retry_double_precision)
            L_1, Q_1, failed_1 = eigh_or_bisect(A_BNN[half:], retry_double_precision)
            failed = failed_0 + [half + row for row in failed_1]
            return torch.cat((L_0, L_1)), torch.cat((Q_0, Q_1)), failed
        if retry_double_precision and A_BNN.dtype != torch.float64:
            logger.warning("eigh failed in %s (%s); trying float64.", A_BNN.dtype, error)
            L, Q, failed = eigh_or_bisect(A_BNN.double(), retry_double_precision)
            return L.to(A_BNN.dtype), Q.to(A_BNN.dtype), failed
        logger.warning("eigh failed in %s: %s", A_BNN.dtype, error)
        size = A_BNN.shape[-1]
        identity = torch.eye(size, dtype=A_BNN.dtype, device=A_BNN.device)
        return torch.ones_like(A_BNN[:, 0]), identity.expand_as(A_BNN), [0]


def _workspace(config: EigenConfig, root: Fraction) -> int:
    """The damped matrix, the eigenvectors, plain and scaled, and the copy that LAPACK works on."""
    return 3


def _waits(config: EigenConfig) -> bool:
    """The eigendecomposition reports to the host whether it converged."""
    del config
    return True


SOLVER = Solver(
    solve=eigen,
    workspace=_workspace,
    check=check,
    is_serial=True,
    has_residual=False,
    waits=_waits,
)
