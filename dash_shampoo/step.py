"""The step of a parameter group on bucket tensors: one operation where the base has one per block.

Between the gradients and the update everything is elementwise or a batched product. So the base's own
arithmetic runs on whole buckets, unchanged, once its lists hold bucket tensors instead of blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dash_shampoo.base import (
    DISTRIBUTOR,
    FILTERED_GRAD_LIST,
    GRAFTING_PRECONDITIONER_LIST,
    MASKED_BLOCKED_GRADS,
    MASKED_BLOCKED_PARAMS,
    MASKED_FILTERED_GRAD_LIST,
    MASKED_MOMENTUM_BUFFER_LIST,
    MASKED_WEIGHT_BUFFER_LIST,
    MOMENTUM_BUFFER_LIST,
    SHAMPOO_PRECONDITIONER_LIST,
    WEIGHT_BUFFER_LIST,
    AdagradPreconditionerList,
    BlockGrid,
    DistributedShampoo,
    Distributor,
    GridBlocks,
    SGDPreconditionerList,
)
from dash_shampoo.buckets.layout import ActiveLayout, Piece, make_layout
from dash_shampoo.buckets.storage import stack_
from dash_shampoo.buckets.transfer import GridsOfPiece, gather, grids_of_pieces
from dash_shampoo.config import GradientPolicy
from dash_shampoo.gradients import GradientGuard
from dash_shampoo.preconditioners.grafting import precondition_and_graft
from dash_shampoo.preconditioners.scalar import ScalarAdagradPreconditionerList
from dash_shampoo.preconditioners.seams import block_specs
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList, leave_out_of_graphs
from dash_shampoo.safety import is_asynchronous

BUCKETS = "dash_buckets"
"""Key of a group's lists under which its `BucketStep` lies."""
STEP = "step"
"""Key of a group's lists under which the base has its step count."""

# The base's methods that are overridden, each with the parameters that are read.
_STEP_SEAMS = {
    "_compute_search_directions": ("state_lists",),
    "_precondition_and_grafting": (
        "state_lists",
        "masked_filtered_grad_list",
        "use_grafting_method",
        "grafting_config_not_none",
    ),
}
# The base's buffers of a block's shape, each with the list of those of the active blocks.
_BUFFERS = {
    FILTERED_GRAD_LIST: MASKED_FILTERED_GRAD_LIST,
    MOMENTUM_BUFFER_LIST: MASKED_MOMENTUM_BUFFER_LIST,
    WEIGHT_BUFFER_LIST: MASKED_WEIGHT_BUFFER_LIST,
}
# Lists whose arithmetic is elementwise, or by slots: they are given bucket tensors as they are.
_ELEMENTWISE_LISTS = (
    AdagradPreconditionerList,
    ScalarAdagradPreconditionerList,
    SGDPreconditionerList,
)
_STEPS_BETWEEN_LOOKS = 100


@dataclass(frozen=True)
class _Selection:
    """What a step needs for one selection of active blocks.

    Attributes:
        pieces: The runs of active slots.
        grids: The active blocks, as the distributor gives them.
        grids_of_pieces: Which of them fill each piece.
        lists: By key of the base, what replaces the lists of blocks: views of the state.
        elementwise: Lists of the base, each with the views of its state that it is to work on.
    """

    pieces: tuple[Piece, ...]
    grids: tuple[BlockGrid, ...]
    grids_of_pieces: tuple[GridsOfPiece, ...]
    lists: dict[str, tuple[Tensor, ...]]
    elementwise: tuple[tuple[AdagradPreconditionerList, tuple[Tensor, ...]], ...]


class BucketLists(dict[str, Any]):
    """A group's lists with bucket tensors in place of blocks, as `BucketStep` makes them for a step.

    Few steps read the parameters (for weight decay or averaging), so these are gathered when they are
    asked for.
    """

    gather_params: Callable[[], tuple[Tensor, ...]]

    def __missing__(self, key: str) -> tuple[Tensor, ...]:
        """Gathers the parameters."""
        if key != MASKED_BLOCKED_PARAMS:
            raise KeyError(key)
        self[key] = self.gather_params()
        return self[key]  # type: ignore[no-any-return]


class BucketStep:
    """Turns a group's lists of blocks into lists of bucket tensors, and directions back into blocks.

    The state tensors (filtered gradients, momentum, averaging, grafting) become views into one tensor
    per bucket.

    Args:
        state_lists: The group's lists, complete; such that `can_serve` them.
        group: The parameter group.
        block_names: For each block the name of its parameter.
        gradient_policy: What a gradient that is not finite leads to.
        is_compiled: Whether the optimizer's step is compiled; what is done here stays out of it.
    """

    def __init__(
        self,
        state_lists: Mapping[str, Any],
        group: Mapping[str, Any],
        block_names: Sequence[str],
        gradient_policy: GradientPolicy,
        is_compiled: bool,
    ) -> None:
        self._distributor = distributor = state_lists[DISTRIBUTOR]
        self._gives_grids = isinstance(distributor, Distributor)  # and not Meta's
        if self._gives_grids:
            distributor.gives_grids = True
        self._group = group
        self._shampoo = state_lists[SHAMPOO_PRECONDITIONER_LIST]
        self._stacked: StackedPreconditionerList | None = None
        if isinstance(self._shampoo, StackedPreconditionerList):
            self._stacked = self._shampoo
            self._stacked.takes_buckets = True
            self._layout = self._stacked.layout
        else:
            self._layout = make_layout(block_specs(self._shampoo, distributor.local_blocked_params))
        labels = [
            ".".join(map(str, info.composable_block_ids))
            for info in distributor.local_block_info_list
        ]
        self.gradient_guard = GradientGuard(self._layout, block_names, labels, gradient_policy)
        self._buffers = {
            masked: self._stack(state_lists[key])
            for key, masked in _BUFFERS.items()
            if key in state_lists
        }
        self._elementwise = [
            (lists, self._stack(lists._local_preconditioner_list))
            for lists in (self._shampoo, state_lists.get(GRAFTING_PRECONDITIONER_LIST))
            if isinstance(lists, AdagradPreconditionerList)
        ]
        self.observer: Callable[[Sequence[Tensor], Sequence[Piece]], None] | None = None
        self._selections: WeakKeyDictionary[ActiveLayout, _Selection] = WeakKeyDictionary()
        self._selected: _Selection | None = None
        if is_compiled:
            leave_out_of_graphs(self, "on_buckets", "_gather", "directions", "to_blocks")

    @staticmethod
    def can_serve(state_lists: Mapping[str, Any]) -> bool:
        """Whether a group's lists can be given bucket tensors; else it works block by block."""
        shampoo = state_lists[SHAMPOO_PRECONDITIONER_LIST]
        grafting = state_lists.get(GRAFTING_PRECONDITIONER_LIST)
        can_run = isinstance(shampoo, StackedPreconditionerList) or _is_elementwise(shampoo)
        return can_run and (grafting is None or _is_elementwise(grafting))

    def on_buckets(self, state_lists: Mapping[str, Any]) -> BucketLists | None:
        """The lists of a step, with bucket tensors in place of blocks.

        Gradients that are not finite are set to zero on the way.

        Args:
            state_lists: The group's lists, masked for this step.

        Returns:
            Lists that share the state's memory; gradients and parameters are copies. None if the step
            is to be skipped.

        Raises:
            PreconditionerValueError: If a gradient is not finite and that raises.
        """
        self._selected = selection = self._select()
        grads = self._gather(state_lists[MASKED_BLOCKED_GRADS], selection)
        return self._lists_with(grads, state_lists, selection)

    def nothing(self, state_lists: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Directions of zeros for the active blocks."""
        return tuple(torch.zeros_like(param) for param in state_lists[MASKED_BLOCKED_PARAMS])

    def directions(
        self,
        lists: BucketLists,
        masked_filtered_grad_list: Sequence[Tensor],
        use_grafting_method: bool,
        grafting_config_not_none: bool,
    ) -> tuple[Tensor, ...]:
        """Directions of the pieces, in new memory; see `precondition_and_graft`."""
        return precondition_and_graft(
            lists,
            masked_filtered_grad_list,
            use_grafting_method,
            grafting_config_not_none,
            self._has_started(lists),
        )

    def to_blocks(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        """Directions of the pieces as views per active block."""
        assert self._selected is not None
        if self.observer is not None:
            self.observer(directions, self._selected.pieces)
        tensors: dict[int, Tensor] = {}
        for direction, grids in zip(directions, self._selected.grids_of_pieces, strict=True):
            tensors.update(zip(grids.numbers, grids.split(direction), strict=True))
        blocks = [tensors[number] for number in range(len(tensors))]
        return GridBlocks(self._selected.grids, blocks) if self._gives_grids else tuple(blocks)

    # ------------------------------------------------------------------------ bad gradients

    def check_gradients(self) -> None:
        """Refuses bad gradients before the first of several groups steps; one alone checks its own.

        Raises:
            PreconditionerValueError: Where the group's policy is to raise.
        """
        if not self._is_shared:
            infos = self._distributor.local_block_info_list
            self.gradient_guard.check([info.param for info in infos])

    @property
    def has_refused_gradients(self) -> bool:
        """Whether the step ended before a gradient had entered any state, of any process."""
        return self.gradient_guard.has_refused and not self._is_shared

    def is_time_to_look(self, step: int) -> bool:
        """Whether to wait for the counts of bad gradients where no refresh ever reads them.

        Groups without roots (Adam's) on an accelerator; every 100 steps, so that waiting costs nothing.

        Args:
            step: The group's step count.
        """
        return (
            self.gradient_guard.waits
            and step % _STEPS_BETWEEN_LOOKS == 0
            # Where others would wait for an error of this process alone, only when they listen.
            and (not self._is_shared or self._distributor.is_late())
        )

    # ---------------------------------------------------------------------------- internals

    @property
    def _is_shared(self) -> bool:
        """Whether other processes wait for this one's directions."""
        return bool(getattr(self._distributor, "is_shared", False))

    def _has_started(self, state_lists: Mapping[str, Any]) -> bool:
        start: float = self._group["start_preconditioning_step"]
        return int(state_lists[STEP]) >= start

    def _lists_with(
        self, grads: tuple[Tensor, ...], state_lists: Mapping[str, Any], selection: _Selection
    ) -> BucketLists | None:
        """The lists of a step on gathered gradients, which are masked; None if it is to be skipped."""
        if not self.gradient_guard.mask_(grads, selection.pieces):
            return None
        for elementwise, views in selection.elementwise:
            elementwise._masked_preconditioner_list = views
        lists = BucketLists({**state_lists, **selection.lists, MASKED_BLOCKED_GRADS: grads})
        del lists[MASKED_BLOCKED_PARAMS]
        params = GridBlocks(selection.grids, [grid.target for grid in selection.grids])
        lists.gather_params = lambda: self._gather(params, selection)
        return lists

    @staticmethod
    def _gather(blocks: Sequence[Tensor], selection: _Selection) -> tuple[Tensor, ...]:
        if not selection.pieces:
            return ()
        # A strided copy moves a grid; on an accelerator one launch for many blocks is worth more.
        if is_asynchronous(selection.pieces[0].bucket.spec.device):
            return tuple(gather(blocks, piece) for piece in selection.pieces)
        tensors = blocks.tensors if isinstance(blocks, GridBlocks) else blocks
        return tuple(grids.gather(tensors) for grids in selection.grids_of_pieces)

    def _select(self) -> _Selection:
        active = self._layout.active(tuple(self._distributor.local_grad_selector))
        if active not in self._selections:
            self._selections[active] = self._new_selection(active.pieces)
        return self._selections[active]

    def _new_selection(self, pieces: tuple[Piece, ...]) -> _Selection:
        if self._gives_grids:
            grids: tuple[BlockGrid, ...] = self._distributor.grids
        else:
            blocks = self._distributor.local_masked_blocked_params
            grids = tuple(BlockGrid((place,), (), block) for place, block in enumerate(blocks))
        return _Selection(
            pieces,
            grids,
            grids_of_pieces(grids, pieces),
            lists={key: _cut(stacks, pieces) for key, stacks in self._buffers.items()},
            elementwise=tuple((lists, _cut(stacks, pieces)) for lists, stacks in self._elementwise),
        )

    def _stack(self, blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            stack_([blocks[index] for index in bucket.blocks]) for bucket in self._layout.buckets
        )


def missing_step_seam() -> str | None:
    """What the base's step lacks for running on bucket tensors, or None."""
    for name, wanted in _STEP_SEAMS.items():
        method = getattr(DistributedShampoo, name, None)
        if method is None:
            return f"DistributedShampoo.{name}"
        known = inspect.signature(method).parameters
        for parameter in wanted:
            if parameter not in known:
                return f"DistributedShampoo.{name}({parameter})"
    return None


def _is_elementwise(lists: object) -> bool:
    return type(lists) in _ELEMENTWISE_LISTS


def _cut(stacks: Sequence[Tensor], pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
    return tuple(stacks[piece.bucket.number][piece.slots] for piece in pieces)
