"""Inverse root by eigendecomposition: any root, any condition number, the reference for the others.

Shape suffixes: A_BNN is a stack of B blocks of N×N; L_BN eigenvalues in ascending order; V_BNN
eigenvectors in rows, A = Vᵀ·diag(L)·V.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from dash_shampoo.base import (
    EigenConfig,
    EighEigendecompositionConfig,
    PerturbationConfig,
    PseudoInverseConfig,
    RankDeficientStabilityConfig,
)
from dash_shampoo.inverse_root.blocks import cleaned, damped, power
from dash_shampoo.inverse_root.chunks import over_chunks
from dash_shampoo.inverse_root.eigh_device import eigh_device
from dash_shampoo.inverse_root.fields import check_choice
from dash_shampoo.inverse_root.result import failures
from dash_shampoo.inverse_root.solver import Solution, Solver
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
    clean, is_finite = cleaned(A, looks=True)  # eigh waits for the device anyway
    L_BN, V_BNN, failed = decompose(damped(clean, epsilon) if is_damped_before else clean, config)
    inv_power_BN = inverse_power(L_BN, float(root), epsilon, config)
    if is_finite is not None:
        inv_power_BN = inv_power_BN.masked_fill(~is_finite[:, None], torch.nan)
    X = Products("fp32")((V_BNN * inv_power_BN[:, :, None]).mT, V_BNN)
    status = failures(failed, A) if failed else None
    return Solution(X, damping=epsilon, is_symmetric=True, status=status)


def inverse_power(L_BN: Tensor, root: float, epsilon: float, config: EigenConfig) -> Tensor:
    """f(λ) = λ^(-1/root) of the repaired eigenvalues, (B, N); no block looks at another."""
    is_dropped = None
    match config.rank_deficient_stability_config:
        case PseudoInverseConfig() as repair:
            rtol = repair.rank_rtol
            if rtol is None:
                rtol = L_BN.shape[-1] * torch.finfo(L_BN.dtype).eps
            largest = L_BN.amax(dim=-1, keepdim=True)
            is_dropped = torch.clamp(rtol * largest.relu(), min=repair.rank_atol) >= L_BN
        case PerturbationConfig(perturb_before_computation=True):
            smallest = L_BN.amin(dim=-1, keepdim=True)
            # Compared in float64, as the base compares Python numbers.
            is_too_small = smallest.double() < epsilon
            L_BN = torch.where(is_too_small, (L_BN - smallest) + epsilon, L_BN)
        case PerturbationConfig() | SpectrumRepairConfig(method="shampoo"):
            L_BN = (L_BN - L_BN.amin(dim=-1, keepdim=True).clamp_max(0.0)) + epsilon
        case SpectrumRepairConfig(method="abs"):
            L_BN = (L_BN - epsilon).abs()
        case SpectrumRepairConfig(method="abs_add"):
            L_BN = (L_BN - epsilon).abs() + epsilon
        case SpectrumRepairConfig(method="relu"):
            L_BN = L_BN - epsilon
            is_dropped = ~((epsilon <= L_BN) & (L_BN > 0.0))
        case unknown:
            raise ValueError(f"rank_deficient_stability_config={unknown!r} is not known to eigen.")
    roots = power(L_BN, -1.0 / root)
    return roots if is_dropped is None else roots.masked_fill(is_dropped, 0.0)


def decompose(
    A_BNN: Tensor, config: EigenConfig | EighEigendecompositionConfig
) -> tuple[Tensor, Tensor, list[int]]:
    """Decompose A = Vᵀ·diag(L)·V, where the config or a table wants it done.

    Args:
        A_BNN: (B, N, N) stack, finite.
        config: Retry and offload device.

    Returns:
        Eigenvalues (B, N), eigenvectors in rows (B, N, N), and the rows that failed.
    """
    there = A_BNN.to(eigh_device(A_BNN, config.eigendecomposition_offload_device))
    # A stack that is on the CPU was cut into chunks before it came here.
    is_moved = there.device.type == "cpu" and A_BNN.device.type != "cpu"
    eigh = _eigh_on_threads if is_moved else eigh_or_bisect
    L_BN, Q_BNN, failed = eigh(there, config.retry_double_precision)
    # LAPACK and cuSOLVER leave the eigenvectors in columns of column-major memory: this is a view.
    V_BNN = Q_BNN.mT.contiguous()
    return L_BN.to(A_BNN.device), V_BNN.to(A_BNN.device), failed


def _eigh_on_threads(
    A_BNN: Tensor, retry_double_precision: bool
) -> tuple[Tensor, Tensor, list[int]]:
    """`eigh_or_bisect` of chunks of a stack on the CPU, on several threads."""

    def eigh(rows: slice) -> tuple[Tensor, Tensor, list[int]]:
        L, Q, failed = eigh_or_bisect(A_BNN[rows], retry_double_precision)
        return L, Q, [rows.start + row for row in failed]

    num_blocks, size, _ = A_BNN.shape
    dtype, device = A_BNN.dtype, A_BNN.device
    parts = over_chunks(
        eigh, num_blocks, size, dtype=dtype, device=device, num_stacks=3, is_serial=True
    )
    eigenvalues, eigenvectors, failed = zip(*parts, strict=True)
    return torch.cat(eigenvalues), torch.cat(eigenvectors), list(chain(*failed))


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


SOLVER = Solver(
    solve=eigen,
    # The damped matrix, the eigenvectors, plain and scaled, and the copy that LAPACK works on.
    workspace=lambda config, root: 3,
    check=check,
    is_serial=True,
    has_residual=False,
    # The eigendecomposition reports to the host whether it converged.
    waits=lambda config: True,
)
