"""The optimizer's state as a tree: its tensors by path, and whether they are where they belong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from dash_shampoo.buckets.storage import bind_, row_of

Path = tuple[Any, ...]
STEP: Final = "step"
LR_SUM: Final = "lr_sum"
TRAIN_MODE: Final = "train_mode"
# One tensor for all parameters of a cohort.
SHARED = (STEP, LR_SUM, TRAIN_MODE)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors of a parameter's state, each with the keys that lead to it.

    Meta's package keeps objects in its state, whose attributes are the keys of their state dict.
    """
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    elif hasattr(tree, "load_state_dict"):
        yield from leaves(vars(tree), path)


def strangers(tree: Any, path: Path = ()) -> Iterator[Path]:
    """The keys that lead to what is neither a tensor nor a collection, in a saved state."""
    if isinstance(tree, (Mapping, list, tuple)):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from strangers(value, (*path, key))
    elif not isinstance(tree, Tensor):
        yield path


def name_of(path: Path) -> str:
    """A path in words."""
    return ".".join(map(str, path))


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor; a plain tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def paired(target: Any, source: Any) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """The tensors of two states of a parameter, path by path.

    Args:
        target: State to copy into.
        source: State to copy, of any dtype and device.

    Returns:
        Pairs of local tensors, into which and which, and in words where the structures differ.
    """
    # Tools that flatten a state turn the numbers of the factor matrices into strings.
    targets, sources = (
        {name_of(path): local(tensor) for path, tensor in leaves(tree)} for tree in (target, source)
    )
    pairs, problems = [], []
    for name in {**targets, **sources}:
        if name not in sources:
            problems.append(f"{name} is missing")
        elif name not in targets:
            problems.append(f"{name} is not known here")
        else:
            into, other = targets[name], sources[name]
            pairs.append((into, other))
            if into.shape != other.shape:
                shape, expected = tuple(other.shape), tuple(into.shape)
                problems.append(f"{name} has shape {shape} instead of {expected}")
    return pairs, problems


@torch.no_grad()
def copy_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair into the first, casting and moving it where that is needed."""
    for into, other in pairs:
        into.copy_(other)


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
            for _, tensor in leaves(tree):
                if (row := row_of(local(tensor))) is not None:
                    self._rows.append((local(tensor), row))

    def _collect(self, tree: Any) -> None:
        if not isinstance(tree, dict):
            return
        self._dicts.append((tree, dict(tree)))
        for value in tree.values():
            self._collect(value)

    @torch.no_grad()
    def heal_(self, state: dict[Tensor, Any]) -> None:
        """Binds again what has left its place.

        Args:
            state: The optimizer's state; parameters that are not in it any more stay out.
        """
        for tree, values in [
            (state, {p: t for p, t in self._trees.items() if p in state}),
            *self._dicts,
        ]:
            for key, value in values.items():
                if tree.get(key) is not value:
                    tree[key] = value
        for tensor, row in self._rows:
            if tensor.data_ptr() != row.data_ptr():
                bind_(tensor, row)
