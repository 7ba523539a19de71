"""What the lists share that keep eigenvectors of factor matrices: their stacks and their refresh.

Shapes: K blocks of a piece, B rows of a stack, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import EigendecompositionConfig, EighEigendecompositionConfig
from dash_shampoo.buckets import ActiveStack, MatrixStack, Piece, Rows, num_rows, subset
from dash_shampoo.eigenbasis import (
    EigenbasisResult,
    check_basis_supported,
    eigenbasis,
    eigenbasis_stack,
    follows_a_basis,
    is_identity,
    method_at,
)
from dash_shampoo.preconditioners.measures import FactorMeasures, measure_basis
from dash_shampoo.preconditioners.modes import contract
from dash_shampoo.preconditioners.seams import BLOCK_SEAMS
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import is_asynchronous


class StackedEigenvectorsPreconditionerList(StackedPreconditionerList):
    """A list that keeps the eigenvectors Q of every factor matrix, refreshed stack by stack."""

    block_seams: tuple[str, ...] = (*BLOCK_SEAMS, "factor_matrices_eigenvectors")
    subject: str = "eigenvectors"
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
        self._method = self._options.amortized_computation_config
        # Stacks in which a row may still have the identity it was made with; of a number it is the basis.
        self._may_lack_basis = [stack.size > 1 for stack in self._layout.stacks]

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

    @property
    def _basis_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._preconditioner_config.factor_matrix_eigenvectors_dtype
        return dtype

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
        number, spec = active.stack, self._layout.stacks[active.stack]
        dtype = torch.promote_types(self._options.factor_matrix_dtype, torch.float32)

        def load(part: slice) -> tuple[Tensor, Tensor]:
            rows = subset(active.rows, part)
            Q = self._eigenvectors[number].data[rows]
            return self._bias_corrected(number, rows).to(dtype), Q.to(dtype)

        config = self._method
        lost = None
        if (
            is_asynchronous(spec.device)
            and self._may_lack_basis[number]
            and follows_a_basis(config)
        ):
            # A host synchronisation, in the first refresh of a stack.
            lost = is_identity(self._eigenvectors[number].data[active.rows]).nonzero().flatten()
        status = eigenbasis_stack(
            load,
            lambda part, result: self._store(number, subset(active.rows, part), result),
            num_matrices=num_rows(active.rows),
            size=spec.size,
            config=config,
            epsilon=self._epsilon,
            dtype=dtype,
            device=spec.device,
            max_workspace_bytes=self._options.max_workspace_bytes,
        )
        if lost is not None:
            self._may_lack_basis[number] = len(lost) > 0
            if len(lost):
                rows = torch.arange(len(self._eigenvectors[number].data), device=spec.device)
                status[lost] = self._decompose(number, rows[active.rows][lost])
        return status

    def _decompose(self, number: int, rows: Rows) -> Tensor:
        """Finds the eigenvectors of a few rows from nothing; gives their status."""
        A = self._bias_corrected(number, rows)
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        Q = self._eigenvectors[number].data[rows]
        result = eigenbasis(A, Q, EighEigendecompositionConfig())
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

    def _measure(self, number: int, rows: slice) -> FactorMeasures:
        A = self._bias_corrected(number, rows)
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        Q = self._eigenvectors[number].data[rows].to(A.dtype)
        return measure_basis(A, Q, self._epsilon, self._scales(number, rows))
