"""Sign descent, stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerList
from dash_shampoo.preconditioners.stateless import StackedStatelessPreconditionerList


class StackedSignDescentPreconditionerList(StackedStatelessPreconditionerList, PreconditionerList):
    """U = scale_fn(G)·sign(G); the scale is a function of each block."""

    def precondition_buckets(self, masked_grad_list: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The signs of every piece, in new memory.

        Args:
            masked_grad_list: (Filtered) gradients, (K, *shape) of each piece.

        Returns:
            Tensors of the same shapes and dtypes.
        """
        scale_fn = self._preconditioner_config.scale_fn
        directions = []
        for grads in masked_grad_list:
            signs = torch.sign(grads)
            for sign, grad in zip(signs, grads, strict=True):
                scale = scale_fn(grad)
                if not (isinstance(scale, (int, float)) and scale == 1.0):
                    sign.mul_(scale)
            directions.append(signs)
        return tuple(directions)
