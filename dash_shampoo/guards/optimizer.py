"""GuardedShampoo: checkpoints, copies and the printed form, in terms of the user's parameters."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from dash_shampoo.base import DistributedShampoo
from dash_shampoo.checkpoint import exported_groups, native_groups
from dash_shampoo.guards import loading
from dash_shampoo.guards.cohorts import PARAMS, partition
from dash_shampoo.guards.following import FollowingShampoo
from dash_shampoo.guards.reconstruction import HOOKS
from dash_shampoo.guards.trees import STEP, TRAIN_MODE, copy_, paired

_ARGUMENTS = "_arguments"
_MAX_SHOWN_GROUPS = 10


class GuardedShampoo(FollowingShampoo):
    """The base's `DistributedShampoo`, sound in everything around its arithmetic.

    Accepts the arguments of the base's class; see there. What the parts do: `ReconstructibleShampoo`
    builds the base again where something structural has changed, `FollowingShampoo` looks for that
    before every step.

    Raises:
        TypeError: If an argument or a parameter has a wrong type.
        ValueError: If one is out of range.
    """

    # -------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> StateDict:
        """The state, by the numbers of the parameters, and the parameter groups.

        Keys, shapes and dtypes are those of the base's class. Configs in the groups read as strings, for
        tools that take plain values only, and are configs again where they are copied or loaded. A
        parameter without state (a frozen one) has an empty entry. Under DDP and `fully_shard` the blocks
        are those of this rank, except after `consolidate_state_dict()`.

        Returns:
            A dict for `load_state_dict` of this class and of the base's.
        """
        if self._is_inside:
            return DistributedShampoo.state_dict(self)
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self._state_to_save()
        for group, known in zip(self.param_groups, self._settings, strict=True):
            known.resolve_beta3(group)  # a scheduler may have edited beta1 since the last step
        groups, numbers = exported_groups(self.param_groups)
        state_dict: StateDict = {
            "state": {number: state.get(param, {}) for param, number in numbers.items()},
            "param_groups": groups,
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _state_to_save(self) -> dict[Tensor, dict[str, Any]]:
        """What `state_dict` holds; for a subclass that knows blocks of other processes."""
        return self._exported_state()

    def _exported_state(self) -> dict[Tensor, dict[str, Any]]:
        """Nested dicts of the state's tensors, by parameter."""
        with self._neutral():
            if self._seen.have_other_groups(self.param_groups):
                self._take_over_groups()
            self._begin_anew()
        self._bound.heal_(self.state)
        if not self._cohorts:
            return {}
        with self._inside():
            exported = DistributedShampoo.state_dict(self)
        return {param: exported["state"][i] for i, param in enumerate(self._seen.params)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state that this class or the base's `DistributedShampoo` saved, of either base.

        The state is copied in place and keeps its precision: fp32 factor matrices of bf16 parameters
        are restored bit for bit. Options in the saved groups are taken over; what the state is built
        from (preconditioner, grafting, blocking, distribution) stays the constructor's. Blocks that
        other ranks own may be in it.

        Under `fully_shard`, with replicas (HSDP) or without, blocks are cut from the rows of each shard.
        A consolidated state fits another number of shards, or one process, where every block of there
        is a block of here: where the shards of both are multiples of `max_preconditioner_dim` rows, for
        instance. How many replicas there are does not matter.

        Args:
            state_dict: As returned by `state_dict()`.

        Raises:
            TypeError: If it is no state dict, or a saved option has a wrong type.
            ValueError: If groups, keys or shapes do not fit, or the state was saved by one rank alone
                and lacks this rank's blocks, or on another number of ranks with other blocks; then
                nothing was changed.
        """
        loading.check_form(state_dict)
        state_dict = state_dict.copy()
        for pre_hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups = native_groups(state_dict["param_groups"], self.param_groups)
        saved = loading.by_parameter(self.param_groups, groups, state_dict["state"])
        updates = loading.options_to_take_over(self.param_groups, groups)
        with self._all_or_nothing(), self._neutral():
            self._load(saved)
        for group, update, known in zip(self.param_groups, updates, self._settings, strict=True):
            group.update(update)
            known.note_loaded(group)
        # As torch does: what a subclass does in its own `__setstate__` must happen.
        self.__setstate__({"state": self.state, "param_groups": self.param_groups})
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)

    def _load(self, saved: dict[Tensor, Any]) -> None:
        self._follow()
        saved = self._state_to_load(saved)
        loading.check_values(saved, self._name_of)
        steps = loading.steps_to_load(self.param_groups, self._steps(), saved)
        wanted = partition(self.param_groups, steps)
        members, wanted_members = (
            [[*map(id, cohort.params)] for cohort in cohorts] for cohorts in (self._cohorts, wanted)
        )
        if wanted_members != members:
            self._reconstruct(steps, "The saved state has other step counts")
        if not self._cohorts:
            return
        copies = loading.copies(self._exported_state(), saved, self._cohorts, self._name_of)
        with self._inside():
            lists = self._per_group_state_lists
            modes = [bool(group[TRAIN_MODE]) for group in lists if TRAIN_MODE in group]
            copy_(copies)
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)  # of Meta's class
            if modes:  # as before the load; the copied state may be of the other
                (self.train if all(modes) else self.eval)()
        self._without_gradient = {
            param for param in self._seen.params if loading.is_untouched(self.state[param])
        }

    def _state_to_load(self, saved: Mapping[Tensor, Any]) -> dict[Tensor, Any]:
        """A saved state in terms of this process's blocks; for a subclass that knows others."""
        return dict(saved)

    # ------------------------------------------------------------------------------- copies

    def __setstate__(self, state: dict[str, Any]) -> None:
        if _ARGUMENTS in state:
            self._restore(state)
        else:
            # Not Meta's, which would look for its own groups in the user's.
            Optimizer.__setstate__(self, state)

    def __getstate__(self) -> dict[str, Any]:
        return {
            _ARGUMENTS: self._arguments,
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state": self._exported_state(),
            "_settings": self._settings,
            "_without_gradient": list(self._without_gradient),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Constructs the base for a copied or unpickled optimizer. Hooks are not copied, as in torch."""
        saved = state["state"]
        vars(self).update({name: OrderedDict() for name in HOOKS})
        vars(self).update({**state, "state": defaultdict(dict)})
        self._without_gradient = set(state["_without_gradient"])
        self._patch_step_function()
        self._construct({param: int(tree[STEP]) for param, tree in saved.items()})
        for param, tree in saved.items():
            pairs, problems = paired(self.state[param], tree)
            assert not problems, problems
            copy_(pairs)

    # ------------------------------------------------------------------------- printed form

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups[:_MAX_SHOWN_GROUPS]):
            lines.append(f"  Parameter group {index}: {_summary(group)}")
        hidden = len(self.param_groups) - _MAX_SHOWN_GROUPS
        if hidden > 0:
            lines.append(f"  and {hidden} more")
        return "\n".join([*lines, ")"])


def _summary(group: dict[str, Any]) -> str:
    params = group[PARAMS]
    config, grafting = group["preconditioner_config"], group["grafting_config"]
    solver = getattr(config, "amortized_computation_config", None)
    preconditioner = type(config).__name__ + (f"({type(solver).__name__})" if solver else "")
    return (
        f"{len(params)} parameters, {sum(p.numel() for p in params):,} elements\n"
        f"    lr={group['lr']:g}, betas={group['betas']}, epsilon={group['epsilon']:g}, "
        f"weight_decay={group['weight_decay']:g} ({group['weight_decay_type'].name})\n"
        f"    max_preconditioner_dim={group['max_preconditioner_dim']}, "
        f"precondition_frequency={group['precondition_frequency']}, "
        f"grafting={type(grafting).__name__ if grafting else None}\n"
        f"    {preconditioner}"
    )
