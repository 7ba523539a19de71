"""A parameter group's step as a CUDA graph, between its bucket tensors and its directions.

    gradients ──gathered, as ever──► bucket tensors, which stay where they are ─┐
    step count, learning rate, bias correction ──► scalars on the device ───────┤
    parameters and state, in memory that does not move ─────────────────────────┤
                                              one graph for each kind of step ◄─┘
    parameters, updated; where processes share blocks, directions in the        │
    gradients' bucket tensors, which the distributor sends as ever ◄────────────┤
    the host's books, as ever ◄── statuses of a refresh ────────────────────────┘

What a replay repeats is the device's work alone. All that the host does (counting, its schedule, its books)
and all that other processes are asked for happens outside of the graph, in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import (
    LR_CPU_PINNED,
    MASKED_BLOCKED_GRADS,
    GridBlocks,
    WeightDecayType,
)
from dash_shampoo.base import name as base_name
from dash_shampoo.buckets.layout import ActiveStack
from dash_shampoo.buckets.transfer import gather
from dash_shampoo.config import GradientPolicy
from dash_shampoo.graphs import Graphs
from dash_shampoo.preconditioners.refresh import Outcomes
from dash_shampoo.step import STEP, BucketStep

# Numbers of a list that its kernels are given.
_NUMBERS = ("_beta2", "_weighting_factor", "_epsilon", "_use_bias_correction")


class CapturedStep(BucketStep):
    """A group's step on bucket tensors, replayed from a CUDA graph where its kind allows that.

    Args:
        *args: As of `BucketStep`.
        **kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self._group["params"][0].device
        self.graphs: Graphs[Outcomes] = Graphs(device)
        self._grads = tuple(
            torch.empty(
                (len(bucket.blocks), *bucket.spec.shape), dtype=bucket.spec.dtype, device=device
            )
            for bucket in self._layout.buckets
        )
        # What of a step's numbers differs from step to step, beside the learning rate, which is there.
        self._step_there = torch.zeros((), dtype=torch.int64, device=device)
        self._divisor_there = torch.ones((), dtype=torch.float64, device=device)

    def search(
        self,
        state_lists: Mapping[str, Any],
        settings: Mapping[str, Any],
        compute: Callable[..., Sequence[Tensor]],
    ) -> Sequence[Tensor] | None:
        """Directions of the active blocks, as `on_buckets`, `compute` and `to_blocks` would give them.

        Args:
            state_lists: The group's lists, masked for this step.
            settings: The other arguments of the base's `_compute_search_directions`.
            compute: That method.

        Returns:
            Views of the bucket tensors, or no blocks where these are updated already; None for a step that
            no graph can hold, of which nothing is done.

        Raises:
            RuntimeError: If the caller captures himself.
            PreconditionerValueError: As of the list's `known_bad`, and so is the other.
            ValueError: See there.
        """
        has_cuda: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        if has_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() can't be captured by a graph of yours: its counts and schedule are the host's, and "
                "capturable=True makes graphs of its own. Call step() outside of your graph."
            )
        stacked, step = self._stacked, state_lists[STEP]
        due: Sequence[ActiveStack] = ()
        if stacked is not None:
            due = stacked.due(int(step), settings["perform_amortized_computation"])
            if stacked.waits(due) or (due and stacked.known_bad()):
                return None
        if settings["iterate_averaging_enabled"] and base_name == "meta":
            return None  # reads a coefficient from the device

        self._selected = selection = self._select()
        grads = tuple(self._grads[piece.bucket.number][piece.slots] for piece in selection.pieces)
        for tensor, piece in zip(grads, selection.pieces, strict=True):
            gather(state_lists[MASKED_BLOCKED_GRADS], piece, out=tensor)
        divisor = 1.0 if stacked is None else stacked.correct_bias(step)
        self._step_there.fill_(int(step))
        self._divisor_there.fill_(divisor)

        is_updated = self._gives_grids and not self._is_shared and self.observer is None

        def launch() -> None:
            lists = self._lists_with(grads, state_lists, selection)
            directions = compute(state_lists=lists, **{**settings, "step": self._step_there})
            if is_updated:
                self._distributor.update_params(self.to_blocks(directions))
            else:
                torch._foreach_copy_(grads, tuple(directions))

        def work() -> Outcomes:
            if stacked is None:
                launch()
                return []
            there = None if divisor == 1.0 else self._divisor_there
            with stacked.captured(step, there) as outcomes:
                launch()
            return outcomes

        key = is_updated, *self._kind(state_lists, settings, due, divisor)
        outcomes = self.graphs.run(key, work, kept=(selection, due))
        if stacked is not None and due:
            stacked.note(outcomes)
        return GridBlocks((), []) if is_updated else self.to_blocks(grads)

    def _kind(
        self,
        state_lists: Mapping[str, Any],
        settings: Mapping[str, Any],
        due: Sequence[ActiveStack],
        divisor: float,
    ) -> tuple[Hashable, ...]:
        """All of a step that its kernels depend on, beside the values in memory that does not move."""
        numbers = {k: v for k, v in settings.items() if not isinstance(v, Tensor)}
        del numbers["perform_amortized_computation"]  # that is `due`
        # Its decay is a number of the host that follows the learning rate.
        is_corrected = settings["weight_decay_type"] == WeightDecayType.CORRECTED
        return (
            tuple(self._distributor.local_grad_selector),
            tuple(sorted(numbers.items())),
            tuple(getattr(self._shampoo, name, None) for name in _NUMBERS),
            state_lists[LR_CPU_PINNED].item()
            if is_corrected and settings["weight_decay"]
            else None,
            tuple(map(id, due)),
            getattr(self._shampoo, "iterations", None) if due else None,
            divisor == 1.0,
            self._has_started(state_lists),
            int(state_lists[STEP]) == 1,  # in which a list may do something else
        )


def check_capturable(
    group: Mapping[str, Any], policy: GradientPolicy, is_compiled: bool, is_on_buckets: bool
) -> None:
    """Refuses to capture the steps of a group of which no step could be.

    Args:
        group: The parameter group.
        policy: What a gradient that is not finite leads to.
        is_compiled: Whether the step is compiled.
        is_on_buckets: Whether the group's lists can be given bucket tensors.

    Raises:
        ValueError: Saying why, and what to do.
    """
    reason = None
    device = group["params"][0].device
    if device.type != "cuda":
        reason = f"needs CUDA parameters, but one is on {device}: move the model there first"
    elif is_compiled:
        reason = "can't go with shampoo_pt2_compile_config, whose graphs are other ones: give one of them"
    elif policy == "skip_step":
        reason = (
            "can't go with SafetyConfig(gradients='skip_step'), for which the host looks at the gradients "
            "of every step: use 'skip_block'"
        )
    elif not is_on_buckets:
        config = type(group["preconditioner_config"]).__name__
        reason = f"can't go with {config} and its grafting_config, which run block by block: leave it out"
    if reason is not None:
        raise ValueError(f"capturable=True {reason}.")
