"""A CUDA graph on the CPU: it records the operators of some work, and repeats them on the same memory.

Under `DeviceCounts`, whose tensors say that they are on a CUDA device and hold real numbers, it can stand
where the package has its `CudaRecorder`. Like that one it does nothing of what it records: memory that was
there before is put back, and what was allocated meanwhile is filled with NaN, so that only a replay can give
results. Numbers of the host are those of the recording for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.device_counts import DeviceCounts

_T = TypeVar("_T")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Runs operators and notes them, each with its tensors.

    Attributes:
        operators (list): (operator, its arguments, its named ones, the new tensors that it gave).
    """

    def __init__(self, device: DeviceCounts) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._device = device
        self._alive: list[Tensor] = []
        self._before: dict[int, tuple[Any, Any]] = {}
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._see(tensor)
        result = func(*args, **kwargs)
        known = set(map(_storage, inputs))
        made = [tensor for tensor in _tensors(result) if _storage(tensor) not in known]
        for tensor in made:
            self._made.setdefault(_storage(tensor), tensor.untyped_storage())
            self._alive.append(tensor)
        is_there = not inputs or any(map(self._device.has, inputs))
        if is_there and (made or func._schema.is_mutable):
            # A kernel takes a scalar of the host by its value.
            args, kwargs = tree_map_only(Tensor, self._baked, (args, kwargs))
            self.operators.append((func, args, kwargs, made))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._made and storage._cdata not in self._before:
            with _disable_current_modes():
                self._before[storage._cdata] = storage, storage.clone()

    def _baked(self, tensor: Tensor) -> Tensor:
        if self._device.has(tensor):
            return tensor
        assert tensor.dim() == 0, "a graph holds no copy from the host's memory"
        with _disable_current_modes():
            return tensor.clone()

    def undo(self) -> None:
        """As if nothing had been done."""
        for storage, values in self._before.values():
            storage.copy_(values)
        for storage in self._made.values():
            storage.fill_(255)


class StandIn:
    """Stands for `dash_shampoo.graphs.CudaRecorder`.

    Attributes:
        num_replays (int): Replays of all graphs of a test.
    """

    counts: DeviceCounts
    num_replays = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def record(self, work: Callable[[], _T]) -> tuple[Callable[[], None], _T]:
        waits = self.counts.counts.waits.total()
        with _Recorder(self.counts) as recorder:
            result = work()
        assert self.counts.counts.waits.total() == waits, "no graph can hold a read"
        with _disable_current_modes():
            recorder.undo()
        return partial(self._replay, recorder.operators), result

    @classmethod
    def _replay(cls, operators: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
        cls.num_replays += 1
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, made in operators:
                results = _tensors(func(*args, **kwargs))
                if made:
                    for target, value in zip(made, results, strict=True):
                        target.copy_(value)


@contextmanager
def graphs_on_the_cpu(device: DeviceCounts) -> Iterator[type[StandIn]]:
    """Has the package record into stand-ins."""

    class Recorder(StandIn):
        counts = device

    with mock.patch("dash_shampoo.graphs.CudaRecorder", Recorder):
        yield Recorder
