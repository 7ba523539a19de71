"""States of many processes in one: for those who save on one rank and load on all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dash_shampoo.base import DISTRIBUTOR, Distributor
from dash_shampoo.distribution import ManyProcesses
from dash_shampoo.guards import GuardedShampoo
from dash_shampoo.guards.trees import Path, leaves, local
from dash_shampoo.resharding import is_of_shards, num_shards, resharded

logger = logging.getLogger(__name__)

_MAX_NAMED = 3


class ConsolidatingShampoo(GuardedShampoo, ManyProcesses):
    """Exports the whole state on one rank, and refuses states of which this rank's part is missing.

    Accepts the arguments of the base's class; see there.
    """

    # By the number of the parameter and the keys down to the tensor.
    _consolidated: dict[Path, Tensor] | None = None
    _consolidated_steps: dict[Tensor, int] | None = None
    _has_warned_of_a_part = False

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Brings the state of all ranks to one, whose next `state_dict()` is complete.

        As in torch's ZeroRedundancyOptimizer; Lightning calls it by itself. All ranks must call it, and
        `state_dict()` must follow before the next step. The complete state has plain tensors on the CPU
        and can be loaded on any number of ranks under DDP; under `fully_shard` on as many as saved it,
        and on others where the blocks are the same there (see `load_state_dict`).

        Args:
            to: The global rank. (Default: 0)
        """
        self._consolidated, self._consolidated_steps = None, None
        numbers = self._numbers()
        found: dict[Path, Tensor] = {}
        exported = self._exported_state()
        for state_lists, cohort in zip(self._per_group_state_lists, self._cohorts, strict=True):
            own: dict[Path, Tensor] = {}
            for param in cohort.params:
                blocks = {k: v for k, v in exported[param].items() if isinstance(v, Mapping)}
                own.update((path, local(t)) for path, t in leaves(blocks, (numbers[param],)))
            groups = _groups_to_gather_over(state_lists[DISTRIBUTOR])
            for index, group in enumerate(groups):
                is_last = index == len(groups) - 1
                own = _gather(own, group, is_kept=not is_last or dist.get_rank() == to)
            found.update(own)
        if not dist.is_initialized() or dist.get_rank() == to:
            self._consolidated, self._consolidated_steps = found, self._steps()

    def _state_to_save(self) -> dict[Tensor, dict[str, Any]]:
        """The blocks of this rank, except after `consolidate_state_dict()`."""
        exported = self._exported_state()
        if self._consolidated is None or self._consolidated_steps != self._steps():
            self._consolidated = None
            self._warn_of_a_partial_state()
            return exported
        complete = {
            param: {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
            for param, tree in exported.items()
        }
        params = {number: param for param, number in self._numbers().items()}
        for (number, *keys), tensor in self._consolidated.items():
            tree = complete[params[number]]
            for key in keys[:-1]:
                tree = tree.setdefault(key, {})
            tree[keys[-1]] = tensor
        return complete

    def _state_to_load(self, saved: Mapping[Tensor, Any]) -> dict[Tensor, Any]:
        """The saved state under the keys of the shards of now, without the blocks of other ranks."""
        result = dict(saved)
        # Not with FSDP1, and what else only Meta's package has.
        if all(isinstance(distributor, Distributor) for distributor in self._distributors()):
            for group in self.param_groups:
                for param in group["params"]:
                    if param in saved and (is_of_shards(saved[param]) or num_shards(param)):
                        name = self._name_of(param)
                        result[param] = resharded(saved[param], param, group, name)
        return self._own_part(result) if self._keeps_a_part() else result

    def _own_part(self, saved: dict[Tensor, Any]) -> dict[Tensor, Any]:
        own, missing, foreign = dict(saved), [], set()
        for param, present in self._exported_state().items():
            if (tree := saved.get(param)) is None:
                continue
            blocks = {key for key, value in present.items() if isinstance(value, Mapping)}
            others = {k for k, v in tree.items() if isinstance(v, Mapping) and k not in blocks}
            missing += [
                f"{key} of parameter {self._name_of(param)}" for key in blocks - tree.keys()
            ]
            foreign |= set(map(str, others))
            own[param] = {key: value for key, value in tree.items() if key not in others}
        if missing and foreign:
            raise ValueError(_what_happened(missing, foreign))
        return own

    def _warn_of_a_partial_state(self) -> None:
        if self._has_warned_of_a_part or not self._keeps_a_part():
            return
        self._has_warned_of_a_part = True
        logger.warning(
            "This state_dict() holds the blocks of rank %d alone. Save it on every rank, or call "
            "consolidate_state_dict() on every rank before rank 0 saves.",
            dist.get_rank(),
        )

    def _keeps_a_part(self) -> bool:
        return any(getattr(one, "keeps_a_part", False) for one in self._distributors())

    def _distributors(self) -> list[Any]:
        return [lists[DISTRIBUTOR] for lists in self._per_group_state_lists]

    def _numbers(self) -> dict[Tensor, int]:
        params = [param for group in self.param_groups for param in group["params"]]
        return {param: number for number, param in enumerate(params)}


def _groups_to_gather_over(distributor: Any) -> list[Any]:
    """Process groups over which the parts add up to the whole, one after the other."""
    if not dist.is_initialized():
        return []
    own = getattr(distributor, "groups_to_gather_over", None)
    return [dist.group.WORLD] if own is None else list(own())


def _gather(own: dict[Path, Tensor], group: Any, is_kept: bool) -> dict[Path, Tensor]:
    """The tensors of all ranks of a group, on the CPU; one rank's where several have a path."""
    everyones: list[Any] = [None] * dist.get_world_size(group)
    described = [(path, tuple(t.shape), t.dtype, t.device.type) for path, t in own.items()]
    dist.all_gather_object(everyones, described, group=group)
    found: dict[Path, Tensor] = {}
    seen = set()
    me = dist.get_rank(group)
    for rank, entries in enumerate(everyones):
        source = dist.get_global_rank(group, rank)
        for path, shape, dtype, device in entries:
            if path in seen:
                continue
            seen.add(path)
            # On the CPU after a first gathering, where a group may be of an accelerator.
            where = torch.device(device if device != "cpu" else _device_of(group))
            if rank == me:
                tensor = own[path].to(where).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=where)
            dist.broadcast(tensor, src=source, group=group)
            if is_kept:
                found[path] = tensor.cpu().clone()
    return found


def _device_of(group: Any) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _what_happened(missing: list[str], foreign: set[str]) -> str:
    named = ", ".join(missing[:_MAX_NAMED])
    more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
    if any(key.startswith("rank_") for key in foreign):
        why = (
            "It was saved by other ranks under fully_shard, where blocks are cut from local shards: load "
            "it on as many ranks as saved it, each rank its own file, or call consolidate_state_dict() on "
            "every rank before one saves a file for all."
        )
    else:
        why = (
            "It was saved by one rank alone, and every rank keeps the state of its own blocks: call "
            "consolidate_state_dict() on every rank before that one saves state_dict(), or save on "
            "every rank."
        )
    return (
        f"Cannot load the optimizer's state, nothing was changed: it has blocks of other ranks, but lacks "
        f"{named}{more}, of this rank {dist.get_rank()}. {why}"
    )
