"""Steps that take over what has changed since the last one, and say so where they can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import (
    LR_CPU_PINNED,
    PREVIOUS_GRAD_SELECTOR,
    DistributedShampoo,
    PreconditionerValueError,
    take_weights,
)
from dash_shampoo.guards import settings
from dash_shampoo.guards.arguments import check_complete
from dash_shampoo.guards.cohorts import PARAMS, options_of
from dash_shampoo.guards.missing import explain_missing_gradients
from dash_shampoo.guards.reconstruction import ReconstructibleShampoo
from dash_shampoo.guards.settings import GroupSettings
from dash_shampoo.guards.trees import LR_SUM, STEP, TRAIN_MODE

# Taken before torch can have wrapped it for hooks: these run around our own step.
_BASE_STEP = DistributedShampoo.step
# A parameter whose first gradient comes later than this many steps after the group's first gets a step
# count of its own; sooner, the group's count serves it, as in Meta's package.
_LATE = 10


class FollowingShampoo(ReconstructibleShampoo):
    """Steps in neutral surroundings, on parameters and options as they are now.

    Accepts the arguments of the base's class; see there.
    """

    _has_warned = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters.

        Args:
            closure: Evaluates the model anew and returns the loss. (Default: None)

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: If averaging is in eval mode, or a gradient is sparse.
            ValueError: If a parameter or an option has become something that can't be trained with.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._neutral():
            self._follow()
            if self._cohorts:
                with self._inside():
                    self._check_mode()
                    self._check_gradients()
                    self._step_of_base()
            self._look_for_gradients()
        return loss

    def _step_of_base(self) -> None:
        try:
            _BASE_STEP(self)
        except RuntimeError:
            # Other rows of the same memory (`p.data = p.data[:100]`) are noticed by their gradient.
            self._check_shapes()
            raise

    def _check_mode(self) -> None:
        # The base asks when the state has taken the gradients already.
        for state_lists in self._per_group_state_lists:
            mode: Tensor | None = state_lists.get(TRAIN_MODE)
            if mode is not None and mode.device.type == "cpu" and not mode:
                raise RuntimeError("The optimizer is in eval mode: call its train() before step().")

    def _check_gradients(self) -> None:
        """Refuses gradients before any group has stepped."""

    def _has_refused_gradients(self, state_lists: Any) -> bool:
        """Whether a group's step ended before a gradient had entered any state."""
        del state_lists
        return False

    def _group_step_body(self, state_lists: Any, *args: Any) -> None:
        counted = [state_lists[key] for key in (STEP, LR_SUM) if key in state_lists]
        before = [count.clone() for count in counted]
        if LR_SUM in state_lists:  # Meta's class divides 0 by 0 while a warm-up is at 0
            state_lists[LR_SUM].clamp_(min=torch.finfo(torch.float32).tiny)
        try:
            super()._group_step_body(state_lists, *args)
        except PreconditionerValueError:
            if self._has_refused_gradients(state_lists):
                for count, value in zip(counted, before, strict=True):
                    count.copy_(value)
            raise

    def _look_for_gradients(self) -> None:
        for state_lists in self._per_group_state_lists:
            if any(state_lists[PREVIOUS_GRAD_SELECTOR] or ()):
                return
        if self._has_warned:
            return
        params = [param for group in self.param_groups for param in group[PARAMS]]
        # A process may own no block of a parameter that has a gradient.
        if params and all(param.grad is None for param in params):
            explain_missing_gradients(params, self._name_of(params[0]))
            self._has_warned = True

    def train(self) -> None:
        """Puts the parameters to the training sequence Y; without averaging does nothing."""
        self._switch("train")

    def eval(self) -> None:
        """Puts the parameters to the evaluation sequence X; without averaging does nothing."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        if not self._is_inside:
            with self._neutral():
                self._follow()
                with self._inside():
                    self._switch(mode)
            return
        for state_lists in self._per_group_state_lists:
            take_weights(state_lists)
        getattr(super(), mode)()

    def _follow(self) -> None:
        """Takes over what has changed in the user's world since the last step."""
        groups = self.param_groups
        if self._seen.have_other_groups(groups):
            self._take_over_groups()
        elif self._seen.have_moved():
            self._check_shapes()
            self._reconstruct(self._steps(), "Parameters lie in other memory")
        if len(self.state) < len(self._seen.params) or not all(self.state.values()):
            self._begin_anew()
        self._give_state_to_new_gradients()
        self._renew_pinned_lr()
        if self._follow_settings():
            for cohort in self._cohorts:
                cohort.group.update(options_of(groups[cohort.group_index]))
        else:
            for cohort in self._cohorts:
                cohort.group["lr"] = groups[cohort.group_index]["lr"]

    def _take_over_groups(self) -> None:
        """Parameters in the groups are other ones: state that was moved to them goes with them."""
        groups = self.param_groups
        for index, group in enumerate(groups):
            check_complete(group, index)
        known = self._settings[: len(groups)]
        self._settings = known + [GroupSettings(group) for group in groups[len(known) :]]
        for index, group in enumerate(groups):
            self._check_group(group, index)
        present = [param for group in groups for param in group[PARAMS]]
        steps = self._steps()
        kept = {param: steps[param] for param in present if param in steps}
        # The others begin with their first gradient.
        self._reconstruct(kept, "Parameters in the groups were replaced")

    def _begin_anew(self) -> None:
        """Parameters whose state was removed: who does that means it, as with torch's optimizers."""
        removed = [param for param in self._seen.params if not self.state.get(param)]
        if removed:
            for param in removed:
                self.state.pop(param, None)
            steps = self._steps()
            steps.update(dict.fromkeys(removed, 0))
            self._reconstruct(steps, "State was removed")

    def _check_shapes(self) -> None:
        param = self._seen.reshaped()
        if param is not None:
            raise ValueError(
                f"Parameter {self._name_of(param)} has now the shape {tuple(param.shape)}, which its "
                "state can't follow: construct a new optimizer after the model's shapes have changed."
            )

    def _give_state_to_new_gradients(self) -> None:
        born = [param for param in self._stateless if param.grad is not None]
        first = [param for param in self._without_gradient if param.grad is not None]
        if not born and not first:
            return
        self._without_gradient.difference_update(first)
        steps = self._steps()
        late = [param for param in first if steps[param] >= _LATE]
        if born or late:
            steps.update(dict.fromkeys([*born, *late], 0))
            self._reconstruct(steps, "Parameters have their first gradient")

    def _renew_pinned_lr(self) -> None:
        """New memory to stage the learning rate in: the copy from the last step's may not have run yet.

        torch hands pinned memory out again only when what was copied from it has arrived.
        """
        for state_lists, cohort in zip(self._per_group_state_lists, self._cohorts, strict=True):
            if cohort.group["use_pin_memory"]:
                state_lists[LR_CPU_PINNED] = torch.empty_like(
                    state_lists[LR_CPU_PINNED], pin_memory=True
                )

    def _follow_settings(self) -> bool:
        has_changed = False
        for index, (group, known) in enumerate(zip(self.param_groups, self._settings, strict=True)):
            if not known.follow(group, index):
                continue
            has_changed = True
            name = known.needs_rebuild(group)
            if name is not None:
                self._reconstruct(self._steps(), f"{name} of parameter group {index} was edited")
            self._settings[index] = known.built(group)
        if has_changed:
            for state_lists, cohort in zip(self._per_group_state_lists, self._cohorts, strict=True):
                settings.apply_(state_lists, self.param_groups[cohort.group_index])
                # The lists of active blocks depend on whether beta1 is 0.
                state_lists[PREVIOUS_GRAD_SELECTOR] = None
        return has_changed
