"""What the lists share that keep eigenvectors of factor matrices: their stacks and their refresh.

Shapes: K blocks of a piece, B rows of a stack, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import EigendecompositionConfig, EighEigendecompositionConfig
from dash_shampoo.buckets import ActiveStack, MatrixStack, Piece, Rows, num_rows, rows_of, subset
from dash_shampoo.eigenbasis import (
    EigenbasisResult,
    check_basis_supported,
    eigenbasis,
    follows_a_basis,
    is_identity,
)
from dash_shampoo.preconditioners.stacked import BLOCK_SEAMS, StackedPreconditionerList, contract
from dash_shampoo.safety import Slot, is_asynchronous

# N×N matrices that a method holds at its peak for each of a chunk, input and output included.
_NUM_STACKS = 8


class StackedEigenvectorsPreconditionerList(StackedPreconditionerList):
    """A list that keeps the eigenvectors Q of every factor matrix, refreshed stack by stack."""

    block_seams: tuple[str, ...] = (*BLOCK_SEAMS, "factor_matrices_eigenvectors")
    _eigenvectors: tuple[MatrixStack, ...]

    @staticmethod
    def check_method(method: EigendecompositionConfig) -> None:
        """Refuses a way to compute eigenvectors that is not known.

        Args:
            method: Its config.

        Raises:
            ValueError: If there is none for it.
        """
        check_basis_supported(method)

    def _check_roots(self, roots: set[float]) -> None:
        check_basis_supported(self._options.amortized_computation_config, self._epsilon)

    def _adopt_state(self) -> None:
        self._eigenvectors = self._stack_matrices("factor_matrices_eigenvectors", packed=False)
        # Stacks in which a row may still have the identity it was made with.
        self._may_lack_basis = [True] * len(self._layout.stacks)

    # --------------------------------------------------------------------- the basis at work

    def _bases(self, piece: Piece, skipped: int | None = None) -> dict[int, Tensor]:
        """The eigenvectors (K, N, N) by dimension, except those of factor number `skipped`."""
        return {
            factor.dimension: self._eigenvectors[factor.stack].data[piece.factor_rows(factor)]
            for number, factor in enumerate(piece.bucket.factors)
            if number != skipped
        }

    def _to_basis(self, grads: Tensor, bases: dict[int, Tensor]) -> Tensor:
        """G ×₁ Q₁ᵀ ×₂ Q₂ᵀ …, in new memory."""
        if not bases:
            return grads.clone()
        return contract(grads, bases, self._basis_dtype).to(grads.dtype)

    def _from_basis(self, rotated: Tensor, bases: dict[int, Tensor]) -> Tensor:
        """G ×₁ Q₁ ×₂ Q₂ …, back in the basis of the parameters."""
        if not bases:
            return rotated
        transposed = {dimension: Q.mT for dimension, Q in bases.items()}
        return contract(rotated, transposed, self._basis_dtype).to(rotated.dtype)

    @property
    def _basis_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._preconditioner_config.factor_matrix_eigenvectors_dtype
        return dtype

    # -------------------------------------------------------------------------- the refresh

    def _compute(self, active: ActiveStack) -> Tensor:
        """Refreshes the eigenvectors of the active rows of a stack.

        Returns:
            The status of each row.
        """
        spec = self._layout.stacks[active.stack]
        dtype = torch.promote_types(self._options.factor_matrix_dtype, torch.float32)
        per_row = _NUM_STACKS * max(spec.size, 1) ** 2 * dtype.itemsize
        step = max(1, self._options.max_workspace_bytes // per_row)
        count = num_rows(active.rows)
        statuses = []
        for start in range(0, count, step):
            rows = subset(active.rows, slice(start, min(start + step, count)))
            result = self._decompose(active.stack, rows, dtype)
            self._store(active.stack, rows, result)
            statuses.append(result.status)
        return torch.cat(statuses)

    def _decompose(self, number: int, rows: Rows, dtype: torch.dtype) -> EigenbasisResult:
        """The new eigenvectors of some rows; rows that went wrong have their previous ones."""
        config = self._options.amortized_computation_config
        A = self._bias_corrected(number, rows).to(dtype)
        Q = self._eigenvectors[number].data[rows]
        result = eigenbasis(A, Q, config, self._epsilon)
        if is_asynchronous(A.device) and follows_a_basis(config) and self._may_lack_basis[number]:
            # A host synchronisation, in the first refresh of a stack.
            lost = is_identity(Q).nonzero().flatten()
            self._may_lack_basis[number] = len(lost) > 0
            if len(lost):
                found = eigenbasis(A[lost], Q[lost], EighEigendecompositionConfig())
                for name in ("eigenvectors", "eigenvalues", "status"):
                    getattr(result, name)[lost] = getattr(found, name)
        return result

    def _store(self, number: int, rows: Rows, result: EigenbasisResult) -> None:
        """Takes over the eigenvectors of some rows; those that went wrong are the previous ones."""
        self._eigenvectors[number].write_(rows, result.eigenvectors)

    def _repair(self, bad: Sequence[Slot]) -> None:
        """Decomposes anew where a method lost its basis, those rows alone and batched by stack."""
        safety = self._options.safety
        if not bad or safety is None or safety.policy != "repair":
            return
        members = set(bad)
        for number, spec in enumerate(self._layout.stacks):
            wanted = [slot for slot, member in enumerate(spec.slots) if member in members]
            if not wanted:
                continue
            rows = rows_of(wanted, spec.device)
            A = self._bias_corrected(number, rows)
            A = A.to(torch.promote_types(A.dtype, torch.float32))
            Q = self._eigenvectors[number].data[rows]
            self._store(number, rows, eigenbasis(A, Q, EighEigendecompositionConfig()))
