"""A saved state in terms of the parameters at hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import SingleDeviceDistributedConfig
from dash_shampoo.guards import trees
from dash_shampoo.guards.arguments import check_options
from dash_shampoo.guards.cohorts import PARAM_NAMES, PARAMS, Cohort, options_of
from dash_shampoo.guards.settings import STRUCTURE
from dash_shampoo.guards.trees import SHARED, STEP, leaves, local, paired

logger = logging.getLogger(__name__)

_REFUSED = "Cannot load the optimizer's state, nothing was changed:"
_MAX_NAMED = 5
# State that does not begin as zeros, or that all parameters of a cohort share.
_NOT_ACCUMULATED = {*SHARED, "weight_buffer", "inv_factor_matrices"}


def check_form(state_dict: object) -> None:
    """Refuses what is no state dict of an optimizer.

    Raises:
        TypeError: Saying what it is instead.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{_REFUSED} it is a {type(state_dict).__name__}, not a dict.")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            found = ", ".join(map(repr, [*state_dict][:_MAX_NAMED]))
            raise TypeError(
                f"{_REFUSED} it has no {key!r} as optimizer.state_dict() has, but the keys [{found}]."
            )
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get(PARAMS), Sequence):
            raise TypeError(f"{_REFUSED} param_groups[{index}] is no parameter group with params.")
    for key, tree in state_dict["state"].items():
        if not isinstance(tree, Mapping):
            raise TypeError(f"{_REFUSED} state[{key!r}] is a {type(tree).__name__}, not a dict.")


def by_parameter(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Any],
) -> dict[Tensor, Any]:
    """The saved state of each parameter; parameters without an entry are left out.

    Raises:
        ValueError: If the groups differ in number or size, or an entry belongs to no parameter.
    """
    sizes, saved_sizes = ([len(g[PARAMS]) for g in gs] for gs in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"{_REFUSED} the saved parameter groups have {saved_sizes} parameters, the optimizer's "
            f"{sizes}."
        )
    identifiers = [identifier for group in saved_groups for identifier in group[PARAMS]]
    params = [param for group in groups for param in group[PARAMS]]
    if unknown := [key for key in saved if key not in set(identifiers)]:
        raise ValueError(f"{_REFUSED} state[{unknown[0]!r}] is not known here.")
    return {
        param: saved[identifier]
        for identifier, param in zip(identifiers, params, strict=True)
        if identifier in saved
    }


def options_to_take_over(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each group the saved options that a load changes.

    Raises:
        TypeError: If a saved option has a wrong type.
        ValueError: If it is out of range.
    """
    updates = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        update = options_of(saved)
        kept = [name for name in STRUCTURE if name in update]
        averaging = "iterate_averaging_config"
        if type(update.get(averaging)) is not type(group[averaging]):
            kept.append(averaging)
        for name in kept:
            if update.pop(name) != group.get(name):
                logger.warning(
                    "%s of parameter group %d stays the constructor's, %s: the checkpoint has another.",
                    name,
                    index,
                    type(group[name]).__name__ if name.endswith("config") else group.get(name),
                )
        if PARAM_NAMES in saved and PARAM_NAMES not in group:
            update[PARAM_NAMES] = saved[PARAM_NAMES]
        check_options({**group, **update}, f" of the saved parameter group {index}")
        updates.append(update)
    return updates


def steps_to_load(
    groups: Sequence[Mapping[str, Any]], steps: Mapping[Tensor, int], saved: Mapping[Tensor, Any]
) -> dict[Tensor, int]:
    """The parameters that have state after a load, each with its step count.

    Args:
        groups: The user's groups.
        steps: The step counts of now.
        saved: The saved state by parameter.

    Raises:
        ValueError: If a parameter that is trained has no saved state, or one without a step count.
    """
    result = {}
    for group in groups:
        is_single = isinstance(group["distributed_config"], SingleDeviceDistributedConfig)
        members = [param for param in group[PARAMS] if param in steps or saved.get(param)]
        known = {p: _step(tree) for p in members if (tree := saved.get(p)) and STEP in tree}
        for param in members:
            tree = saved.get(param)
            if param in known:
                result[param] = known[param]
            elif tree and is_single:
                raise ValueError(
                    f"{_REFUSED} the entry for a parameter of shape {tuple(param.shape)} has no 'step'."
                )
            elif tree or not is_single:
                result[param] = next(iter(known.values()), 0)
            elif tree is None and param.requires_grad:
                raise ValueError(
                    f"{_REFUSED} it has no entry for a parameter of shape {tuple(param.shape)}, which "
                    "is trained. Was it saved with other parameters or groups?"
                )
            # Else it was frozen when the state was saved, and begins with its first gradient.
    return result


def _step(tree: Mapping[str, Any]) -> int:
    step = tree[STEP]
    if isinstance(step, Tensor) and step.numel() == 1 and not (step.is_meta or step.is_complex()):
        step = step.item()
    number = float(step) if isinstance(step, Real) else math.nan
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"{_REFUSED} it has step={tree[STEP]!r}: must be a whole number from 0.")
    return int(number)


def check_values(saved: Mapping[Tensor, Any], name_of: Callable[[Tensor], str]) -> None:
    """Refuses tensors that no state can hold, and values that are not finite, which would train to NaN.

    Raises:
        ValueError: Naming the first such tensor.
    """
    for param, tree in saved.items():
        for path, tensor in leaves(tree):
            tensor = local(tensor)
            what = None
            if tensor.is_meta or tensor.layout != torch.strided:
                what = f"is a tensor on {tensor.device} with the layout {tensor.layout}"
            elif tensor.is_complex():
                what = f"has dtype {tensor.dtype}"
            elif not bool(torch.isfinite(tensor).all()):
                what = "holds nan or inf"
            if what is not None:
                raise ValueError(
                    f"{_REFUSED} {trees.name_of(path)} of parameter {name_of(param)} {what}. Load another "
                    "checkpoint, or leave this parameter's entry empty ({}), so that it begins anew."
                )


def copies(
    present: Mapping[Tensor, Any],
    saved: Mapping[Tensor, Any],
    cohorts: Sequence[Cohort],
    name_of: Callable[[Tensor], str],
) -> list[tuple[Tensor, Tensor]]:
    """Pairs the state with the saved one, on either base; Meta's package would go on with what fits.

    Args:
        present: The state in nested dicts, by parameter.
        saved: The saved state by parameter; who has none there keeps what it has.
        cohorts: The cohorts, whose parameters share some of the state.
        name_of: The name of a parameter, for messages.

    Returns:
        Pairs of local tensors: into which to copy and which.

    Raises:
        ValueError: Naming what is missing, unknown, of another shape, or not the same where it is shared.
    """
    pairs, problems = [], []
    for cohort in cohorts:
        saved_trees = {param: saved[param] for param in cohort.params if saved.get(param)}
        shared = {}
        for key in SHARED:
            values = sorted(float(tree[key]) for tree in saved_trees.values() if key in tree)
            if values:
                shared[key] = torch.tensor(values[0], dtype=torch.float64)
                if not math.isclose(values[0], values[-1], rel_tol=1e-6):
                    problems.append(
                        f"{key}, aliased across parameters sharing a group, is {values[0]:g} and "
                        f"{values[-1]:g}"
                    )
        for param, tree in saved_trees.items():
            problems += [
                f"{trees.name_of(path)} is no tensor (parameter {name_of(param)})"
                for path in trees.strangers(tree)
                if path[0] not in SHARED
            ]
            found, unequal = paired(present[param], {**tree, **shared})
            pairs += found
            problems += [f"{problem} (parameter {name_of(param)})" for problem in unequal]
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise ValueError(
            f"{_REFUSED} {'; '.join(problems[:_MAX_NAMED])}{more}. Was it saved with other settings, or "
            "by another process, which keeps other blocks?"
        )
    return pairs


def is_untouched(tree: Any) -> bool:
    """Whether a parameter's state shows that it has had no gradient yet."""
    accumulated = [
        tensor for path, tensor in leaves(tree) if not _NOT_ACCUMULATED.intersection(path)
    ]
    return bool(accumulated) and not any(bool(local(t).any()) for t in accumulated)
