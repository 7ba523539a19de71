"""What the lists share that keep eigenvectors of factor matrices: their stacks and their refresh.

Shapes: K blocks of a piece, B rows of a stack, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import EighEigendecompositionConfig
from dash_shampoo.buckets.layout import ActiveStack, Piece, Rows, num_rows, subset
from dash_shampoo.buckets.storage import MatrixStack
from dash_shampoo.eigenbasis import (
    EigenbasisResult,
    check_basis_supported,
    eigenbasis,
    eigenbasis_stack,
    follows_a_basis,
    is_identity,
    method_at,
)
from dash_shampoo.preconditioners.measures import measure_basis
from dash_shampoo.preconditioners.modes import contract
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import is_asynchronous


class StackedEigenvectorsPreconditionerList(StackedPreconditionerList):
    """A list that keeps the eigenvectors Q of every factor matrix, refreshed stack by stack."""

    block_seams = (*StackedPreconditionerList.block_seams, "factor_matrices_eigenvectors")
    subject = "eigenvectors"
    check_method = staticmethod(check_basis_supported)
    _eigenvectors: tuple[MatrixStack, ...]

    def _check(self, block_list: Sequence[Tensor], block_names: Sequence[str]) -> None:
        self._method = self._options.amortized_computation_config
        check_basis_supported(self._method, self._epsilon)

    def _adopt_state(self) -> None:
        self._eigenvectors = self._stack_matrices("factor_matrices_eigenvectors")
        self._basis_dtype: torch.dtype = self._options.factor_matrix_eigenvectors_dtype
        # Stacks in which a row may still have the identity it was made with; of a number it is the basis.
        self._may_lack_basis = [stack.size > 1 for stack in self.layout.stacks]

    # --------------------------------------------------------------------- the basis at work

    def _bases(self, piece: Piece, part: slice, skipped: int | None = None) -> dict[int, Tensor]:
        """The eigenvectors (K, N, N) of some rows of a piece by dimension, except of one factor."""
        return {
            factor.dimension: self._eigenvectors[factor.stack].data[
                subset(piece.factor_rows(factor), part)
            ]
            for number, factor in enumerate(piece.bucket.factors)
            if number != skipped
        }

    def _to_basis(self, grads: Tensor, bases: dict[int, Tensor]) -> Tensor:
        """G ×₁ Q₁ᵀ ×₂ Q₂ᵀ …, in new memory."""
        if not bases:
            return grads.clone()
        return contract(grads, bases, self._basis_dtype).to(grads.dtype)

    def _from_basis(self, rotated: Tensor, bases: dict[int, Tensor], out: Tensor) -> None:
        """G ×₁ Q₁ ×₂ Q₂ …, back in the basis of the parameters."""
        transposed = {dimension: Q.mT for dimension, Q in bases.items()}
        contract(rotated, transposed, self._basis_dtype, out)

    # -------------------------------------------------------------------------- the refresh

    def due(self, step: int, is_due: bool) -> Sequence[ActiveStack]:
        """What is to be refreshed in a step; from then on this is the step whose method counts.

        Args:
            step: Step count.
            is_due: Whether the base's schedule has a refresh in this step.
        """
        group = self._group
        refreshes = (step - group["start_preconditioning_step"]) // group["precondition_frequency"]
        self._method = method_at(self._options.amortized_computation_config, refreshes)
        return super().due(step, is_due)

    @property
    def iterations(self) -> int | None:
        """How many the method runs in this step, where it iterates a fixed number of times."""
        return getattr(self._method, "num_iterations", None)

    def waits(self, due: Sequence[ActiveStack]) -> bool:
        """Whether a basis is decomposed, or whether all rows have one is not known yet."""
        follows = follows_a_basis(self._method)
        return any(not follows or self._may_lack_basis[active.stack] for active in due)

    def _compute(self, active: ActiveStack) -> Tensor:
        """Refreshes the eigenvectors of the active rows of a stack.

        Returns:
            The status of each row.
        """
        number, Q = active.stack, self._eigenvectors[active.stack].data
        may_lack = self._may_lack_basis[number] and follows_a_basis(self._method)
        lost = None
        if may_lack and is_asynchronous(Q.device):
            # A host synchronisation, in the first refresh of a stack.
            lost = is_identity(Q[active.rows]).nonzero().flatten()
        status = eigenbasis_stack(
            lambda part: self._load(number, subset(active.rows, part)),
            lambda part, result: self._store(number, subset(active.rows, part), result),
            num_matrices=num_rows(active.rows),
            size=Q.shape[-1],
            config=self._method,
            epsilon=self._epsilon,
            dtype=self._solving_dtype,
            device=Q.device,
            max_workspace_bytes=self._options.max_workspace_bytes,
        )
        if lost is not None:
            self._may_lack_basis[number] = len(lost) > 0
            if len(lost):
                rows = torch.arange(len(Q), device=Q.device)
                status[lost] = self._decompose(number, rows[active.rows][lost])
        return status

    def _load(self, number: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """The factor matrices of some rows and their eigenvectors, in the dtype for solving."""
        Q = self._eigenvectors[number].data[rows].to(self._solving_dtype)
        return self._bias_corrected(number, rows), Q

    def _decompose(self, number: int, rows: Rows) -> Tensor:
        """Finds the eigenvectors of a few rows from nothing; gives their status."""
        result = eigenbasis(*self._load(number, rows), EighEigendecompositionConfig())
        self._store(number, rows, result)
        return result.status

    def _store(self, number: int, rows: Rows, result: EigenbasisResult) -> None:
        """Takes over the eigenvectors of some rows; those that went wrong are the previous ones."""
        self._eigenvectors[number].write_(rows, result.eigenvectors)

    def _compute_again(self, bad: ActiveStack) -> None:
        self._decompose(bad.stack, bad.rows)

    def _scales(self, number: int, rows: slice) -> Tensor | None:
        """Inverse roots of the eigenvalues (K, N) of some rows, where the list has any."""
        del number, rows
        return None

    def _measure(self, number: int, rows: slice) -> Tensor:
        return measure_basis(*self._load(number, rows), self._epsilon, self._scales(number, rows))
