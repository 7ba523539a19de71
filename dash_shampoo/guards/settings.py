"""Options of parameter groups that are edited between steps: obeyed, or refused at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch

from dash_shampoo.base import ROW_PARTS, SHAMPOO_PRECONDITIONER_LIST, AdagradPreconditionerList
from dash_shampoo.guards.arguments import OPTIONS, check_complete, check_lr, check_options

# What the state is built from.
STRUCTURE = (
    "max_preconditioner_dim",
    "distributed_config",
    "preconditioner_config",
    "grafting_config",
    "use_pin_memory",
    ROW_PARTS,
)
_AVERAGING = "iterate_averaging_config"
_FOLLOWS_BETA1 = -1.0
# All but the last are in every group.
_NAMES = (*(name for name in OPTIONS if name != "lr"), ROW_PARTS)
_values_of = itemgetter(*_NAMES[:-1])


class GroupSettings:
    """The options of one of the user's groups as the last step knew them.

    Args:
        group: The group, before the base has resolved its options.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._follows_beta1 = group["beta3"] == _FOLLOWS_BETA1
        self._last_beta3 = group["beta3"]
        self._last_lr: object = None
        self._known = _options(group)
        self.first_beta1: float = group["betas"][0]

    def follow(self, group: dict[str, Any], index: int) -> bool:
        """Takes notice of edits: resolves beta3 = -1, checks what is new.

        Where nothing was edited this is two comparisons: it comes before every step.

        Args:
            group: The user's group.
            index: Its number, for messages.

        Returns:
            Whether something besides the learning rate is not as it was built.

        Raises:
            TypeError: If an edited option has a wrong type.
            ValueError: If it is out of range, or an option was removed.
        """
        try:
            lr, options = group["lr"], _options(group)
        except KeyError:
            check_complete(group, index)
            raise
        if lr is not self._last_lr:
            check_lr(lr, f" of parameter group {index}")
            self._last_lr = lr
        if options == self._known:
            return False
        # Refreshing less often than before is no contradiction to a start that was given once.
        start = group["start_preconditioning_step"]
        is_edit = start == self._before("start_preconditioning_step")
        check_options(group, f" of parameter group {index}", is_edit=is_edit)
        self.resolve_beta3(group)
        return _options(group) != self._known

    def _before(self, name: str) -> Any:
        """An option as the last step knew it."""
        return self._known[_NAMES.index(name)]

    def resolve_beta3(self, group: dict[str, Any]) -> None:
        """beta3 = -1 means beta1, also where a scheduler cycles that; an explicit one stays.

        Args:
            group: The user's group; modified.
        """
        if group["beta3"] == _FOLLOWS_BETA1:
            self._follows_beta1 = True
        elif group["beta3"] != self._last_beta3:
            self._follows_beta1 = False
        if self._follows_beta1:
            group["beta3"] = group["betas"][0]
        self._last_beta3 = group["beta3"]

    def note_loaded(self, group: Mapping[str, Any]) -> None:
        """Takes notice of loaded options: beta3 goes on to follow beta1 where the two are equal."""
        self._follows_beta1 = self._follows_beta1 and group["beta3"] == group["betas"][0]
        self._last_beta3 = group["beta3"]

    def built(self, group: Mapping[str, Any]) -> GroupSettings:
        """The settings of a state that was built for the group as it is; this object stays as it was."""
        result = copy.copy(self)
        result._last_beta3 = group["beta3"]
        result._known = _options(group)
        return result

    def needs_rebuild(self, group: Mapping[str, Any]) -> str | None:
        """The name of an option that the state was not built for, or None.

        Raises:
            ValueError: If the state lacks what the option needs.
        """
        if self.first_beta1 == 0.0 and group["betas"][0] != 0.0:
            raise ValueError(
                f"betas[0] can't change from 0 to {group['betas'][0]}: there is no filtered gradient to "
                "go on with. Construct the optimizer with betas[0] above 0."
            )
        averaging = self._before(_AVERAGING)
        if type(averaging) is not type(group[_AVERAGING]):
            raise ValueError(
                f"{_AVERAGING} can't change from {averaging} to {group[_AVERAGING]} after "
                "construction: the state has no buffers for it. Construct a new optimizer."
            )
        for name in STRUCTURE:
            then, now = self._before(name), group.get(name)
            if now is not then and now != then:
                return name
        return None


def _options(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The options in a group, by `_NAMES`, without the learning rate, which changes at every step."""
    return (*_values_of(group), group.get(ROW_PARTS))


def apply_(state_lists: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Hands options that the base's preconditioner list has copied to it: beta2, epsilon, correction."""
    preconditioners = state_lists[SHAMPOO_PRECONDITIONER_LIST]
    # Adam's and the like have a beta2 and an epsilon of their own, in their config.
    if isinstance(preconditioners, AdagradPreconditionerList) or not hasattr(
        preconditioners, "_weighting_factor"
    ):
        return
    beta2 = group["betas"][1]
    is_sum = beta2 == 1.0 or getattr(
        group["preconditioner_config"], "drop_weighting_factor_on_gsquare", False
    )
    preconditioners._beta2 = beta2
    preconditioners._weighting_factor = 1.0 if is_sum else 1 - beta2
    preconditioners._epsilon = group["epsilon"]
    preconditioners._use_bias_correction = group["use_bias_correction"]
    if not group["use_bias_correction"] or beta2 == 1.0:
        preconditioners._bias_correction2 = torch.tensor(1.0)
