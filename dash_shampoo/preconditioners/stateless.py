"""Lists whose direction is a function of the gradient alone, and have no state: signs and Muon's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerList, SVDOrthogonalizationConfig
from dash_shampoo.buckets.layout import ActiveStack, Piece
from dash_shampoo.orthogonalization import check_orthogonalization_supported, orthogonalize
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList


class StackedStatelessPreconditionerList(StackedPreconditionerList):
    """A list without state: buckets of gradients in, buckets of directions out."""

    list_seams: tuple[str, ...] = ("_preconditioner_config",)
    block_seams: tuple[str, ...] = ()

    _local_kronecker_factors_unwrapped = ()

    def _adopt_state(self) -> None:
        pass

    def update_preconditioners(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Keeps nothing."""

    def correct_bias(self, step: Tensor) -> float:
        """There is nothing to correct."""
        return 1.0


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
        scale_fn = self._options.scale_fn
        signs = torch.sign(grads)
        for sign, grad in zip(signs, grads, strict=True):
            scale = scale_fn(grad)
            if not (isinstance(scale, (int, float)) and scale == 1.0):
                sign.mul_(scale)
        return signs


class StackedSpectralDescentPreconditionerList(
    StackedStatelessPreconditionerList, PreconditionerList
):
    """U = scale·(nearest orthogonal matrix of G), all matrices of a shape at once.

    References:
        Carlson et al., Preconditioned spectral descent, 2015; Jordan et al., Muon, 2024.
    """

    method_name = "orthogonalization_config"
    check_method = staticmethod(check_orthogonalization_supported)

    def _check(self, block_list: Sequence[Tensor], block_names: Sequence[str]) -> None:
        for block, name in zip(block_list, block_names, strict=True):
            if block.dim() != 2:
                raise ValueError(
                    f"Spectral descent is for matrices, but a block of {name} is of shape "
                    f"{tuple(block.shape)}: give such parameters a group with another "
                    "preconditioner_config (param_groups does), or have tensors of higher order reshaped "
                    "by max_preconditioner_dim=math.inf and target_parameter_dimensionality=2."
                )

    def waits(self, due: Sequence[ActiveStack]) -> bool:
        """Whether the method is a decomposition, in every step."""
        config = self._options.orthogonalization_config
        return isinstance(config, SVDOrthogonalizationConfig)

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """The orthogonalised gradients (K, M, N)."""
        del piece, skipped
        return orthogonalize(grads, self._options.orthogonalization_config)
