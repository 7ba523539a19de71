"""The one entry to all eigenbases: checks, dispatch by config, bad blocks, chunks on the CPU.

A method is a function ``method(A, Q, config) -> EigenbasisResult`` on a clean stack: (B, N, N) with
B, N >= 1, contiguous, float32 or float64, finite. It may not write to `A` or `Q`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import (
    EigendecompositionConfig,
    EighEigendecompositionConfig,
    PseudoInverseConfig,
    QREigendecompositionConfig,
)
from dash_shampoo.eigenbasis.eigh import eigh
from dash_shampoo.eigenbasis.orthogonal_iteration import (
    OrthogonalIterationConfig,
    orthogonal_iteration,
)
from dash_shampoo.eigenbasis.qr import qr
from dash_shampoo.eigenbasis.result import EigenbasisResult
from dash_shampoo.inverse_root import InverseRootStatus
from dash_shampoo.inverse_root.blocks import can_look, cleaned, damped, is_known_to_be, per_block
from dash_shampoo.inverse_root.chunks import NO_CAP, joined, over_chunks
from dash_shampoo.inverse_root.registry import of_class
from dash_shampoo.inverse_root.result import is_usable

_Method = Callable[[Tensor, Tensor, Any], EigenbasisResult]
_METHODS: dict[type[EigendecompositionConfig], _Method] = {
    EighEigendecompositionConfig: eigh,
    QREigendecompositionConfig: qr,
    OrthogonalIterationConfig: orthogonal_iteration,
}
_REPAIR = EighEigendecompositionConfig()
# N×N matrices that a method holds at its peak for each of a chunk, input and output included.
_NUM_STACKS = 8

Load = Callable[[slice], tuple[Tensor, Tensor]]
Store = Callable[[slice, EigenbasisResult], None]


def find_method(config: object) -> _Method:
    """Find the method of a config by its class, or else its nearest base class.

    Raises:
        ValueError: If no method takes it.
    """
    return of_class(_METHODS, config, "eigenbasis")


def follows_a_basis(config: EigendecompositionConfig) -> bool:
    """Tell whether a method goes on from a basis and can't find one.

    Args:
        config: How the eigenvectors are computed.

    Returns:
        Whether a block whose Q is still the identity needs an eigendecomposition first.
    """
    return find_method(config) is orthogonal_iteration


def method_at(config: EigendecompositionConfig, refreshes: int) -> EigendecompositionConfig:
    """What a config asks for in one refresh of many.

    Args:
        config: How the eigenvectors are computed.
        refreshes: How many there were before.

    Returns:
        The config, with more iterations in the first refreshes of a method that follows a basis.
    """
    return config.at(refreshes) if isinstance(config, OrthogonalIterationConfig) else config


def check_basis_supported(config: EigendecompositionConfig, epsilon: float = 0.0) -> None:
    """Refuse a config that no method takes, or an epsilon that its repair of the spectrum forbids.

    Args:
        config: How the eigenvectors are computed.
        epsilon: The damping, finite and at least 0.

    Raises:
        ValueError: If there is no method, or epsilon is not allowed.

    Examples:
        >>> check_basis_supported(OrthogonalIterationConfig(), epsilon=1e-10)
        >>> check_basis_supported(None)
        Traceback (most recent call last):
        ValueError: No eigenbasis takes NoneType; there are methods for EighEigendecompositionConfig, ...
    """
    find_method(config)
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"{epsilon=} must be finite and at least 0.")
    if isinstance(config.rank_deficient_stability_config, PseudoInverseConfig) and epsilon != 0.0:
        raise ValueError(f"{epsilon=} must be 0.0 with PseudoInverseConfig.")


def eigenbasis(
    A: Tensor, Q: Tensor, config: EigendecompositionConfig, epsilon: float = 0.0
) -> EigenbasisResult:
    """Eigenvectors of each block of a stack, by the method of the config, from the previous ones.

    Every block is treated on its own: one that holds NaN, or on which the method fails, leaves the
    others bit-identical, keeps its previous eigenvectors and is reported in `status`. On the CPU a
    block on which an iteration fails is decomposed by eigh at once; on a device, where looking
    would be a host sync, it is left to the caller.

    Args:
        A: (B, N, N) stack, symmetric positive semi-definite up to rounding, float32 or float64.
        Q: (B, N, N) previous eigenvectors in columns, in any floating dtype. The identity means
            that there are none yet: `OrthogonalIterationConfig` then starts with an
            eigendecomposition, the others as the base does.
        config: The method and its options.
        epsilon: Damping ε of A + εI, where `rank_deficient_stability_config` is a perturbation
            before the computation. Default: 0.

    Returns:
        Eigenvectors in the dtype of `A`, eigenvalues, status and order.

    Raises:
        ValueError: If the shapes differ or are not square, the dtype is not one of the above, or
            the config or the epsilon is not supported.

    Note:
        The methods' docstrings have their costs. On a device, that a basis is the identity is seen
        by the caller (`is_identity`), not here.

    Examples:
        >>> A = torch.diag(torch.tensor([3.0, 1.0])).expand(4, 2, 2)
        >>> result = eigenbasis(A, torch.eye(2).expand(4, 2, 2), EighEigendecompositionConfig())
        >>> result.eigenvalues[0].tolist(), result.status.tolist()
        ([1.0, 3.0], [0, 0, 0, 0])
    """
    _check_shapes(A, Q)
    results: dict[int, EigenbasisResult] = {}
    status = eigenbasis_stack(
        lambda rows: (A[rows], Q[rows].to(A.dtype)),
        lambda rows, result: results.update({rows.start: result}),
        num_matrices=A.shape[0],
        size=A.shape[-1],
        config=config,
        epsilon=epsilon,
        dtype=A.dtype,
        device=A.device,
    )
    if not results:
        return EigenbasisResult(Q.to(A.dtype).clone(), A.new_zeros(A.shape[:2]), status)
    return joined([results[start] for start in sorted(results)])


def eigenbasis_stack(
    load: Load,
    store: Store,
    *,
    num_matrices: int,
    size: int,
    config: EigendecompositionConfig,
    epsilon: float,
    dtype: torch.dtype,
    device: torch.device,
    max_workspace_bytes: int = NO_CAP,
) -> Tensor:
    """Eigenvectors of B matrices that the caller loads and stores piece by piece; see `eigenbasis`.

    Args:
        load: load(rows) gives matrices A and previous eigenvectors Q, both (K, N, N) in `dtype`, of
            consecutive rows; may be views, which are not modified. Called from several threads, for rows
            that don't overlap.
        store: store(rows, result) takes what became of them. Called like `load`, once for every row.
        num_matrices: B.
        size: N.
        config: The method and its options.
        epsilon: Damping.
        dtype: float32 or float64.
        device: Of the matrices.
        max_workspace_bytes: Cap on the memory taken at once; a single matrix is done in any case.
            Default: none.

    Returns:
        (B,) status of every matrix.

    Raises:
        ValueError: As of `eigenbasis`.
    """
    check_basis_supported(config, epsilon)
    is_damped = getattr(config.rank_deficient_stability_config, "perturb_before_computation", False)
    damping = epsilon if is_damped else 0.0
    if num_matrices == 0 or size == 0:
        return torch.zeros(num_matrices, dtype=torch.uint8, device=device)

    def solve(rows: slice) -> Tensor:
        result = _solve(*load(rows), config, damping)
        store(rows, result)
        return result.status

    statuses = over_chunks(
        solve,
        num_matrices,
        size,
        dtype=dtype,
        device=device,
        num_stacks=_NUM_STACKS,
        is_serial=not follows_a_basis(config),  # else it is by products
        max_workspace_bytes=max_workspace_bytes,
    )
    return torch.cat(statuses)


def is_identity(Q: Tensor) -> Tensor:
    """Tell the blocks that are exactly I, the state before the first refresh.

    Args:
        Q: (B, N, N) eigenvectors.

    Returns:
        (B,) bool.
    """
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return Q.eq(identity).flatten(1).all(1)


def _check_shapes(A: Tensor, Q: Tensor) -> None:
    if A.ndim != 3 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be a stack of square matrices (B, N, N), not {tuple(A.shape)}.")
    if Q.shape != A.shape:
        raise ValueError(f"Q must have the shape of A, {tuple(A.shape)}, not {tuple(Q.shape)}.")
    if A.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A must be float32 or float64, not {A.dtype}.")


def _solve(
    A: Tensor, Q: Tensor, config: EigendecompositionConfig, damping: float
) -> EigenbasisResult:
    """One chunk: bad blocks replaced by the identity, the method, its failures repaired."""
    clean, is_finite = cleaned(A)
    clean = damped(clean.contiguous(), damping)
    result = find_method(config)(clean, Q, config)
    if follows_a_basis(config) and can_look(A):
        result = _decompose_the_lost(result, clean, Q)
    status = result.status
    if is_finite is not None:
        status = status.masked_fill(~is_finite, int(InverseRootStatus.NON_FINITE_INPUT))
    is_new = is_usable(status)
    if is_known_to_be(True, is_new):
        return result
    return EigenbasisResult(
        torch.where(per_block(is_new), result.eigenvectors, Q),
        result.eigenvalues.masked_fill(~is_new[:, None], torch.nan),
        status,
        result.order,
    )


def _decompose_the_lost(result: EigenbasisResult, A: Tensor, Q: Tensor) -> EigenbasisResult:
    """The result of a method that follows a basis, where there was none or it lost it by eigh."""
    is_lost = result.status == int(InverseRootStatus.FAILED)  # eigenvectors that are not finite too
    candidates = (Q[:, 0, 0] == 1.0).nonzero().flatten()
    if len(candidates):
        is_lost[candidates] |= is_identity(Q[candidates])
    rows = is_lost.nonzero().flatten()
    if len(rows) == 0:
        return result
    new = eigh(A[rows], Q[rows], _REPAIR)
    result.eigenvectors[rows], result.eigenvalues[rows] = new.eigenvectors, new.eigenvalues
    result.status[rows] = new.status
    if result.order is not None:
        result.order[rows] = torch.arange(A.shape[-1])
    return result
