"""Lists whose direction is a function of the gradient alone, and have no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from dash_shampoo.buckets import layout_of_shapes
from dash_shampoo.preconditioners.options import StackedOptions
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import FailureLedger


class StackedStatelessPreconditionerList(StackedPreconditionerList):
    """A list without state: buckets of gradients in, buckets of directions out."""

    list_seams: tuple[str, ...] = ("_dims_list", "_preconditioner_config")
    block_seams: tuple[str, ...] = ()
    is_linear = False

    @classmethod
    def adopt(
        cls,
        base_list: Any,
        block_list: Sequence[Tensor],
        block_names: Sequence[str],
        options: StackedOptions,
        group: Mapping[str, Any],
        is_compiled: bool = False,
    ) -> Self:
        """Turns the base's list into a stacked one.

        Args:
            base_list: The list as the base built it; not to be used afterwards.
            block_list: The local blocks of the group's parameters, as given to the base's list.
            block_names: For each block a name for messages.
            options: The function and its options.
            group: The parameter group; nothing is asked of it here.
            is_compiled: Whether the optimizer's step is compiled; what stays out of it is the caller's.

        Returns:
            The stacked list.

        Raises:
            ValueError: If a block has a shape that the function does not take.
        """
        del group, is_compiled
        self = cls.__new__(cls)
        self.__dict__.update(base_list.__dict__)
        self._preconditioner_config = options
        self._options = options
        for block, name in zip(block_list, block_names, strict=True):
            self._check_block(block, name)
        self._layout = layout_of_shapes(block_list)
        self._active = self._layout.active((True,) * len(block_list))
        self._ledger = FailureLedger([], block_names, 0, None)
        self._is_asynchronous = False
        return self

    def _check_block(self, block: Tensor, name: str) -> None:
        """Refuses a block of a shape that the function does not take."""

    def update_buckets(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Keeps nothing."""
