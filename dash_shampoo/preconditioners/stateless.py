"""Lists whose direction is a function of the gradient alone, and have no state."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dash_shampoo.buckets import Layout, layout_of_shapes
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList


class StackedStatelessPreconditionerList(StackedPreconditionerList):
    """A list without state: buckets of gradients in, buckets of directions out."""

    list_seams: tuple[str, ...] = ("_dims_list", "_preconditioner_config")
    block_seams: tuple[str, ...] = ()

    _local_kronecker_factors_unwrapped = ()

    def _lay_out(self, block_list: Sequence[Tensor], block_names: Sequence[str]) -> Layout:
        for block, name in zip(block_list, block_names, strict=True):
            self._check_block(block, name)
        return layout_of_shapes(block_list)

    def _adopt_state(self) -> None:
        pass

    def _check_block(self, block: Tensor, name: str) -> None:
        """Refuses a block of a shape that the function does not take, by a ValueError."""

    def update_buckets(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Keeps nothing."""

    def correct_bias(self, step: Tensor) -> float:
        """There is nothing to correct."""
        return 1.0
