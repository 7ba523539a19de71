"""Eigenvalue-corrected Shampoo (SOAP), stacked: Adam in the eigenbasis of the factor matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerList
from dash_shampoo.buckets.layout import ActiveStack, Piece
from dash_shampoo.buckets.storage import stack_
from dash_shampoo.eigenbasis import follows_a_basis, is_identity
from dash_shampoo.preconditioners.eigenvectors import StackedEigenvectorsPreconditionerList
from dash_shampoo.preconditioners.modes import by_parts, contract, parts
from dash_shampoo.safety import is_asynchronous


class StackedEigenvalueCorrectedShampooPreconditionerList(
    StackedEigenvectorsPreconditionerList, PreconditionerList
):
    """Adam in the basis of the eigenvectors of Shampoo's factor matrices.

        F ← beta2·F + w·G₍ₖ₎G₍ₖ₎ᵀ                     per bucket and dimension k
        Q ← eigenvectors of F / bias_correction2       per stack, when the amortized computation is due
        V ← beta2·V + w·(G ×₁ Q₁ᵀ ×₂ Q₂ᵀ …)²            per bucket
        U ← (G ×₁ Q₁ᵀ …) / ((V / bias_correction2)^a + ε) ×₁ Q₁ ×₂ Q₂ …     a = 1/2 unless overridden

    `DashSOAPPreconditionerConfig` gives the first step no direction, and carries V over where a basis
    changes all at once: V ← V ×₁ (P₁∘P₁)ᵀ …, P = Q_oldᵀ·Q_new, the second moments in the new basis
    of entries that were uncorrelated in the old one.

    References:
        Vyas et al. (SOAP), arXiv 2409.11321; Eschenhagen et al., arXiv 2506.03595.
    """

    block_seams = (
        *StackedEigenvectorsPreconditionerList.block_seams,
        "corrected_eigenvalues",
    )
    _second_moments: tuple[Tensor, ...]

    def _adopt_state(self) -> None:
        super()._adopt_state()
        blocks = self._local_kronecker_factors_unwrapped
        self._second_moments = tuple(
            stack_([blocks[index].corrected_eigenvalues for index in bucket.blocks])
            for bucket in self.layout.buckets
        )
        self._skips_first = getattr(self._options, "skip_first_step", False)
        self._aligns = getattr(self._options, "align_second_moment", False)
        self._is_idle = False  # whether this step has no direction
        self._exponents = [1 / blocks[bucket.blocks[0]].roots[0] for bucket in self.layout.buckets]

    def _update(self, grads: Sequence[Tensor], step: Tensor, is_due: bool) -> None:
        """Accumulates the factor matrices, refreshes the bases when due, then the second moments."""
        self._is_idle = self._skips_first and int(step) == 1
        if self._is_idle:  # in the basis of the parameters, from which it is carried over
            self._accumulate_all_(grads)
        super()._update(grads, step, is_due)
        if not self._is_idle:
            self._accumulate_all_(grads)

    def _accumulate_all_(self, grads_of_pieces: Sequence[Tensor]) -> None:
        """V ← beta2·V + w·(G in its basis)²."""
        for piece, grads in zip(self._active.pieces, grads_of_pieces, strict=True):
            second_moments = self._second_moments[piece.bucket.number][piece.slots]
            for part in parts(grads):
                rotated = self._to_basis(grads[part], self._bases(piece, part))
                second_moment = second_moments[part]
                if self._beta2 != 1.0:
                    second_moment.mul_(self._beta2)
                second_moment.addcmul_(rotated, rotated, value=self._weighting_factor)

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """Adam's direction in the eigenbasis; zeros in a step that has none."""
        del skipped
        if self._is_idle:
            return torch.zeros_like(grads)
        second_moments = self._second_moments[piece.bucket.number][piece.slots]

        def direction(grads: Tensor, part: slice, out: Tensor) -> None:
            bases = self._bases(piece, part)
            denominator = second_moments[part].div(self.divisor)
            denominator.pow_(self._exponents[piece.bucket.number]).add_(self._epsilon)
            self._from_basis(self._to_basis(grads, bases).div_(denominator), bases, out)

        return by_parts(grads, direction)

    # -------------------------------------------------------------------------- the refresh

    def _compute(self, active: ActiveStack) -> Tensor:
        """Refreshes bases of a stack, and carries the second moments over where that is wanted."""
        follows = follows_a_basis(self._method)
        if not self._aligns or (follows and not self._may_lack_basis[active.stack]):
            return super()._compute(active)
        previous = self._eigenvectors[active.stack].data[active.rows].clone()
        status = super()._compute(active)
        is_changed = is_identity(previous) if follows else None
        self._carry_over_(active, previous, is_changed)
        if is_changed is not None and not is_asynchronous(previous.device) and is_changed.any():
            remaining = is_identity(self._eigenvectors[active.stack].data)
            self._may_lack_basis[active.stack] = bool(remaining.any())
        return status

    def _compute_again(self, bad: ActiveStack) -> None:
        if not self._aligns:
            return super()._compute_again(bad)
        previous = self._eigenvectors[bad.stack].data[bad.rows].clone()
        super()._compute_again(bad)
        return self._carry_over_(bad, previous)

    def _carry_over_(
        self, changed: ActiveStack, previous: Tensor, is_changed: Tensor | None = None
    ) -> None:
        """V ← V ×ₖ (P∘P)ᵀ, P = Q_oldᵀ·Q_new, of the blocks whose basis of dimension k changed.

        Args:
            changed: Rows of a stack.
            previous: (B, N, N) their Q_old.
            is_changed: (B,) for which of them; for the others every column continues its own.
                (Default: None, for all)
        """
        Q = self._eigenvectors[changed.stack].data[changed.rows]
        squares = torch.bmm(previous.mT, Q).square_()
        if is_changed is not None:
            identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
            squares = torch.where(is_changed[:, None, None], squares, identity)
        for piece in self._active.pieces:
            second_moments = self._second_moments[piece.bucket.number][piece.slots]
            for number, factor in enumerate(piece.bucket.factors):
                if factor.stack != changed.stack:
                    continue
                for blocks, rows in changed.overlaps(piece, number):
                    V = second_moments[blocks]
                    V.copy_(contract(V, {factor.dimension: squares[rows]}, self._basis_dtype))
