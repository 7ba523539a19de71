"""A state that was saved under `fully_shard` on one number of ranks, under the keys of another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dash_shampoo.base import blocks_of_shards
from dash_shampoo.guards.trees import local

_KEY = re.compile(r"(?:rank_(\d+)-)?block_\d+")


def num_shards(param: Tensor) -> int | None:
    """Among how many processes the rows of a parameter are sharded; None for a plain parameter."""
    for dimension, placement in enumerate(getattr(param, "placements", ())):
        if placement.is_shard():
            size: int = param.device_mesh.size(dimension)  # type: ignore[attr-defined]
            return size
    return None


def is_of_shards(tree: Mapping[Any, Any]) -> bool:
    """Whether the state of a parameter was saved under `fully_shard`."""
    return any(str(key).startswith("rank_") for key in tree)


def resharded(
    saved: Mapping[Any, Any], param: Tensor, group: Mapping[str, Any], name: str
) -> Mapping[Any, Any]:
    """The saved state of a parameter under the keys that its blocks have here.

    Blocks are cut from local rows, so that another number of ranks cuts other blocks, unless shards are
    multiples of `max_preconditioner_dim` or blocks reach over none of the borders. Every process
    decides the same, as all look at the blocks of all.

    Args:
        saved: The complete state, of all shards. A state that is not complete is given back as it is.
        param: The parameter as it is sharded now.
        group: Its group.
        name: The parameter, for messages.

    Returns:
        The state of all shards of now.

    Raises:
        ValueError: If a block of now is none of those that were saved.
    """
    keys = {key: _KEY.fullmatch(str(key)) for key in saved if isinstance(saved[key], Mapping)}
    ranks = [match[1] for match in keys.values() if match is not None]
    if not ranks or len(ranks) < len(keys) or len({rank is None for rank in ranks}) > 1:
        return saved
    # Ranks beyond these had no rows: `chunk` cuts as many rows for the same number of parts.
    then = None if ranks[0] is None else max(map(int, ranks)) + 1
    before = blocks_of_shards(param.shape, then, group)
    after = blocks_of_shards(param.shape, num_shards(param), group)
    if before.keys() != keys.keys() or before == after:
        return saved
    # One rank's own part of a state can have the keys of a complete one of fewer shards.
    if all(key in after and _can_be_of(saved[key], after[key][1]) for key in keys):
        return saved
    keys_then = {position: key for key, position in before.items()}
    for key, position in after.items():
        if position not in keys_then:
            limit = group["max_preconditioner_dim"]
            raise ValueError(
                "Cannot load the optimizer's state, nothing was changed: parameter "
                f"{name} of shape {tuple(param.shape)} was saved {_in_words(then)} and is now "
                f"{_in_words(num_shards(param))}, where {key} of shape {position[1]} is none of the "
                "blocks that were saved. Blocks are cut from local shards: load on as many ranks as "
                f"saved it, or on numbers of ranks whose shards are multiples of "
                f"max_preconditioner_dim={limit} rows, or begin with a new state."
            )
    result = {key: value for key, value in saved.items() if key not in keys}
    result.update({key: saved[keys_then[position]] for key, position in after.items()})
    return result


def _can_be_of(tree: Any, shape: tuple[int, ...]) -> bool:
    """Whether the tensors of a block's state have the sizes that those of a block of this shape have."""
    if isinstance(tree, Mapping):
        return all(_can_be_of(value, shape) for value in tree.values())
    if not isinstance(tree, Tensor):
        return True
    of_factors = (count for n in shape for count in (n, n * n, n * (n + 1) // 2))
    return local(tree).numel() in {0, 1, math.prod(shape), *of_factors}


def _in_words(number: int | None) -> str:
    return "whole" if number is None else f"in {number} shards"
