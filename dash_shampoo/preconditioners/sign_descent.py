"""Sign descent, stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerList
from dash_shampoo.buckets import ActiveStack, Piece
from dash_shampoo.preconditioners.stateless import StackedStatelessPreconditionerList


class StackedSignDescentPreconditionerList(StackedStatelessPreconditionerList, PreconditionerList):
    """U = scale_fn(G)·sign(G); the scale is a function of each block."""

    def waits(self, due: Sequence[ActiveStack]) -> bool:
        """`scale_fn` is the user's: it may read, or give another number in every step."""
        return True

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """The signs, scaled block by block."""
        del piece, skipped
        scale_fn = self._preconditioner_config.scale_fn
        signs = torch.sign(grads)
        for sign, grad in zip(signs, grads, strict=True):
            scale = scale_fn(grad)
            if not (isinstance(scale, (int, float)) and scale == 1.0):
                sign.mul_(scale)
        return signs
