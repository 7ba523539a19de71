"""Spectral descent (Muon), stacked: orthogonalised gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dash_shampoo.base import (
    OrthogonalizationConfig,
    PreconditionerList,
    SVDOrthogonalizationConfig,
)
from dash_shampoo.buckets import ActiveStack, Piece
from dash_shampoo.orthogonalization import check_orthogonalization_supported, orthogonalize
from dash_shampoo.preconditioners.stateless import StackedStatelessPreconditionerList


class StackedSpectralDescentPreconditionerList(
    StackedStatelessPreconditionerList, PreconditionerList
):
    """U = scale·(nearest orthogonal matrix of G), all matrices of a shape at once.

    References:
        Carlson et al., Preconditioned spectral descent, 2015; Jordan et al., Muon, 2024.
    """

    @staticmethod
    def check_method(method: OrthogonalizationConfig) -> None:
        """Refuses a way to orthogonalise that is not known.

        Args:
            method: Its config.

        Raises:
            ValueError: If there is none for it.
        """
        check_orthogonalization_supported(method)

    def _check_block(self, block: Tensor, name: str) -> None:
        if block.dim() != 2:
            raise ValueError(
                f"Spectral descent is for matrices, but a block of {name} is of shape "
                f"{tuple(block.shape)}: give such parameters a group with another "
                "preconditioner_config (param_groups does), or have tensors of higher order reshaped "
                "by max_preconditioner_dim=math.inf and target_parameter_dimensionality=2."
            )

    def waits(self, due: Sequence[ActiveStack]) -> bool:
        """Whether the method is a decomposition, in every step."""
        config = self._preconditioner_config.orthogonalization_config
        return isinstance(config, SVDOrthogonalizationConfig)

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """The orthogonalised gradients (K, M, N)."""
        del piece, skipped
        config = self._preconditioner_config.orthogonalization_config
        return orthogonalize(grads, config)
