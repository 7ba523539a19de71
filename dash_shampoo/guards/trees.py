"""The optimizer's state as a tree: its tensors by path, and whether they are where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.buckets import bind_, row_of

Path = tuple[str, ...]
# One tensor for all parameters of a cohort.
STEP = "step"
LR_SUM = "lr_sum"
TRAIN_MODE = "train_mode"


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors of a parameter's state, each with the keys that lead to it.

    Meta's package keeps objects in its state, whose attributes are the keys of their state dict.
    """
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, str(index)))
    elif hasattr(tree, "load_state_dict"):
        yield from leaves(vars(tree), path)


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor; a plain tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


@torch.no_grad()
def copy_state(target: Any, source: Any) -> str | None:
    """Copies a parameter's state, tensor by tensor, casting and moving it where that is needed.

    Args:
        target: State to copy into.
        source: State of the same structure. Nothing is copied if it is another.

    Returns:
        Why the structures differ, or None.
    """
    targets, sources = dict(leaves(target)), dict(leaves(source))
    if unequal := sorted(targets.keys() ^ sources.keys()):
        where = "new" if unequal[0] in targets else "gone"
        return f"{'.'.join(unequal[0])} would be {where}"
    for path, tensor in targets.items():
        if local(tensor).shape != local(sources[path]).shape:
            now, then = tuple(local(tensor).shape), tuple(local(sources[path]).shape)
            return f"{'.'.join(path)} would have shape {now} instead of {then}"
    for path, tensor in targets.items():
        local(tensor).copy_(local(sources[path]))
    return None


class BoundState:
    """The tensors that the steps work on, for detecting state that has left them.

    A tensor of the state may be replaced in its dict, or the dict itself (by a helper that offloads
    them), or a storage be moved (`share_memory_`, a multiprocessing queue). Steps go on in the old memory;
    what is exported then would be stale. `heal_` puts things back: the values of the steps are the true
    ones.

    Args:
        state: The optimizer's state, as it was built.
    """

    def __init__(self, state: Mapping[Tensor, Any]) -> None:
        self._trees = dict(state)
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []
        for tree in state.values():
            self._collect(tree)
        for _, tensor in (leaf for tree in state.values() for leaf in leaves(tree)):
            row = row_of(local(tensor))
            if row is not None:
                self._rows.append((local(tensor), row))

    def _collect(self, tree: Any) -> None:
        if not isinstance(tree, dict):
            return
        self._dicts.append((tree, dict(tree)))
        for value in tree.values():
            self._collect(value)

    @torch.no_grad()
    def heal_(self, state: dict[Tensor, Any]) -> int:
        """Binds again what has left its place.

        Args:
            state: The optimizer's state; parameters that are not in it any more stay out.

        Returns:
            How many tensors and dicts that were.
        """
        num_healed = 0
        for tree, values in [
            (state, {p: t for p, t in self._trees.items() if p in state}),
            *self._dicts,
        ]:
            for key, value in values.items():
                if tree.get(key) is not value:
                    tree[key] = value
                    num_healed += 1
        for tensor, row in self._rows:
            if tensor.data_ptr() != row.data_ptr():
                bind_(tensor, row)
                num_healed += 1
        return num_healed
