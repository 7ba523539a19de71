"""Saving and loading: nested state, configs of the other base, loading all or nothing."""

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.dtensors import local_tensor

_REFUSED = "Cannot load the optimizer's state, nothing was changed:"
_MAX_NAMED = 5
# One tensor for all parameters of a group.
_SHARED = ("step", "lr_sum", "train_mode")


def copy_nested(state: Any) -> Any:
    """The nested dicts of a state anew, with the very tensors."""
    if isinstance(state, dict):
        return {key: copy_nested(value) for key, value in state.items()}
    return state


def native_config(value: Any, namespace: Mapping[str, Any]) -> Any:
    """Rebuilds a config of the other base as the class of the same name of this one.

    Args:
        value: Anything; only dataclasses and enums whose class name is in the namespace change.
        namespace: Classes by name.

    Returns:
        The config in this base's classes, its nested configs likewise.
    """
    cls = namespace.get(type(value).__name__)
    if not isinstance(cls, type) or isinstance(value, cls):
        return value
    if isinstance(value, enum.Enum) and issubclass(cls, enum.Enum):
        return cls[value.name]
    if is_dataclass(value) and is_dataclass(cls):
        return cls(
            **{
                field.name: native_config(getattr(value, field.name), namespace)
                for field in fields(cls)
                if field.init and hasattr(value, field.name)
            }
        )
    return value


def match_state(
    groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    saved: Mapping[Any, Any],
    distributors: Sequence[Distributor],
) -> list[tuple[Tensor, Tensor]]:
    """Checks a saved state against the current one, changing nothing.

    Args:
        groups: The optimizer's parameter groups.
        saved_groups: Those of the saved state.
        state: Current state.
        saved: State to load. Blocks that another process keeps may be in it.
        distributors: One per group, which know those blocks.

    Returns:
        Pairs of local tensors: into which to copy and which.

    Raises:
        ValueError: If the groups differ in number or size, keys are missing or unexpected, shapes differ,
            or the parameters of a group have different values of what they share.
    """
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(
            f"{_REFUSED} the saved parameter groups have {saved_sizes} parameters, the optimizer's "
            f"{sizes}."
        )
    copies: list[tuple[Tensor, Tensor]] = []
    problems: list[str] = []
    for group, saved_group, distributor in zip(groups, saved_groups, distributors, strict=True):
        shared: dict[str, Any] = {}
        for identifier, param in zip(saved_group["params"], group["params"], strict=True):
            path, tree = f"state[{identifier!r}]", saved.get(identifier)
            if not isinstance(tree, Mapping):
                problems.append(f"{path} is missing")
                continue
            local = {
                key: value
                for key, value in tree.items()
                if key in state[param] or not distributor.is_foreign_block(param, str(key))
            }
            problems.extend(_match(state[param], local, path, copies))
            problems.extend(_unequal(shared, local, path))
    known = {identifier for group in saved_groups for identifier in group["params"]}
    problems.extend(f"state[{key!r}] is not known here" for key in saved if key not in known)
    if problems:
        if (more := len(problems) - _MAX_NAMED) > 0:
            problems[_MAX_NAMED:] = [f"and {more} more"]
        raise ValueError(
            f"{_REFUSED} {'; '.join(problems)}. Was it saved with other parameters or groups, another "
            "max_preconditioner_dim, grafting, beta1 or averaging?"
        )
    return copies


def _unequal(shared: dict[str, Any], saved: Mapping[str, Any], path: str) -> Iterator[str]:
    for key in _SHARED:
        if key in saved:
            value, first = float(saved[key]), float(shared.setdefault(key, saved[key]))
            if not math.isclose(value, first, rel_tol=1e-6) and value == value:
                yield f"{path}[{key!r}] is {value:g}, but {first:g} for others of its group"


def _match(
    current: Any, saved: Any, path: str, copies: list[tuple[Tensor, Tensor]]
) -> Iterator[str]:
    if isinstance(current, Mapping):
        if not isinstance(saved, Mapping):
            yield f"{path} is not a dict"
            return
        # Tools that flatten a state turn the numbers of the factor matrices into strings.
        by_key = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in saved.items()}
        yield from (f"{path}[{key!r}] is missing" for key in current if key not in by_key)
        yield from (f"{path}[{key!r}] is not known here" for key in by_key if key not in current)
        for key in current:
            if key in by_key:
                yield from _match(current[key], by_key[key], f"{path}[{key!r}]", copies)
        return
    if not isinstance(saved, (Tensor, bool, int, float)):
        yield f"{path} is not a tensor"
        return
    target, source = local_tensor(current), local_tensor(torch.as_tensor(saved))
    if target.shape != source.shape:
        yield f"{path} has shape {tuple(source.shape)} instead of {tuple(target.shape)}"
        return
    copies.append((target, source))
