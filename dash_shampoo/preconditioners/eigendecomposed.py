"""Shampoo by stored eigendecompositions, stacked: the plain method and KL-Shampoo."""

from __future__ import annotations

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerList
from dash_shampoo.buckets.layout import Piece, Rows, subset
from dash_shampoo.buckets.storage import stack_
from dash_shampoo.eigenbasis import EigenbasisResult
from dash_shampoo.inverse_root.eigen import inverse_power
from dash_shampoo.preconditioners.eigenvectors import StackedEigenvectorsPreconditionerList
from dash_shampoo.preconditioners.modes import by_parts


class StackedEigendecomposedShampooPreconditionerList(
    StackedEigenvectorsPreconditionerList, PreconditionerList
):
    """Shampoo with F = Q·diag(λ)·Qᵀ stored instead of its inverse root.

        F ← beta2·F + w·G₍ₖ₎G₍ₖ₎ᵀ          per bucket and dimension k
        Q, λ ← F / bias_correction2         per stack, when the amortized computation is due
        U ← Q·(QᵀG ⊙ λ^(-1/p))              per bucket and dimension

    The exponent is applied in every step, after the repair of the spectrum that the config names, so a
    root may be changed without a refresh. Where the base forms each block's root anew in every step, the
    gradient is rotated here and scaled: as many products for a square block, and no root in memory.

    References:
        arXiv 2309.06497 (Distributed Shampoo).
    """

    block_seams = (
        *StackedEigenvectorsPreconditionerList.block_seams,
        "factor_matrices_eigenvalues",
    )
    has_roots = True
    _eigenvalues: tuple[Tensor, ...]

    def _adopt_state(self) -> None:
        super()._adopt_state()
        blocks = self._local_kronecker_factors_unwrapped
        self._eigenvalues = tuple(
            stack_([blocks[i].factor_matrices_eigenvalues[number] for i, number in stack.slots])
            for stack in self.layout.stacks
        )

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """U = G ×₁ F₁^(-1/p₁) ×₂ F₂^(-1/p₂) …, except over factor number `skipped`."""

        def apply_roots(grads: Tensor, part: slice, out: Tensor) -> None:
            bases = self._bases(piece, part, skipped)
            rotated = self._to_basis(grads, bases)
            for factor in piece.bucket.factors:
                if factor.dimension not in bases:
                    continue
                scale = self._scales(factor.stack, subset(piece.factor_rows(factor), part))
                shape = [len(grads), *[1] * (grads.dim() - 1)]
                shape[factor.dimension + 1] = scale.shape[-1]
                rotated.mul_(scale.view(shape))
            self._from_basis(rotated, bases, out)

        return by_parts(grads, apply_roots)

    def _scales(self, number: int, rows: slice) -> Tensor:
        return inverse_power(
            self._eigenvalues[number][rows],
            self.layout.stacks[number].root,
            self._epsilon,
            self._options.amortized_computation_config,
        )

    def _store(self, number: int, rows: Rows, result: EigenbasisResult) -> None:
        super()._store(number, rows, result)
        eigenvalues = self._eigenvalues[number]
        # A factor matrix of zeros keeps the eigenvalues that it has: 0 would be inverted as the damping.
        usable = (result.is_usable & self._factors[number].are_nonzero(rows))[:, None]
        eigenvalues[rows] = torch.where(
            usable, result.eigenvalues.to(eigenvalues.dtype), eigenvalues[rows]
        )
