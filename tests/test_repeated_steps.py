"""What a step gives the device anew: a CUDA graph of one step could be replayed as the next but for that."""

from __future__ import annotations

import re
import sys
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dash_shampoo as ds
from benchmarks.device_counts import DeviceCounts
from benchmarks.ours import CONFIGS

SHAPES = ((20, 13), (8, 8), (8, 8), (5, 9))
# The functions that hand a number of the step to the device, on either base: the learning rate, the bias
# corrections of the grafting and of the filtered gradients, and in a refresh that of the factor matrices.
FILTER = {"embedded": "_filter", "meta": "_compute_filtered_grad_list"}[ds.base.name]
IN_EVERY_STEP = {"_group_step_body", "precondition", FILTER}
IN_A_REFRESH = {
    "newton_db": {"divided"},
    "newton_schulz": {"divided"},
    "chebyshev": {"divided"},
    "minimax": {"minimax", "scaled"},
    "default": {"minimax", "scaled", "__call__"},  # the product of its residual
}


class Recorder(TorchDispatchMode):
    """Operations on the device in their order: name, scalars, the memory of each tensor, the caller.

    Memory that the step itself allocated goes by the order of allocation, other memory by its address. A
    scalar tensor of the host counts by its value, as a kernel takes it so.
    """

    def __init__(self, device: DeviceCounts) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[Any, ...], str]] = []
        self._device = device
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tuple(map(self._describe, tree_leaves((args, kwargs))))
        if any(map(self._device.has, _tensors((args, kwargs)))):
            self.operations.append((str(func), leaves, _caller()))
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()._cdata
            if storage not in before and storage not in self._numbers:
                self._numbers[storage] = len(self._numbers)
                self._alive.append(tensor)
        return result

    def _describe(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        storage = leaf.untyped_storage()._cdata
        if leaf.dim() == 0 and not self._device.has(leaf):
            with torch.utils._python_dispatch._disable_current_modes():
                return float(leaf)
        place = self._numbers.get(storage, ("kept", storage))
        return place, leaf.storage_offset(), tuple(leaf.shape), leaf.stride()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        if re.search(r"/(dash_shampoo|distributed_shampoo)/", frame.f_code.co_filename):
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


def record(name: str, frequency: int) -> list[list[tuple[str, tuple[Any, ...], str]]]:
    """The operations of eight steps with the same gradients' memory and a learning rate that changes."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    steps = []
    with DeviceCounts({}, default="") as device:
        device.place(chain(values, gradients))
        parameters = [torch.nn.Parameter(value) for value in values]
        config = CONFIGS[name]
        optimizer = ds.DashShampoo(
            parameters,
            lr=0.01,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            max_preconditioner_dim=8,
            precondition_frequency=frequency,
            start_preconditioning_step=frequency,
            grafting_config=ds.AdamPreconditionerConfig(beta2=0.99) if config.grafts else None,
            preconditioner_config=config.make(),
            concurrency_config=ds.ConcurrencyConfig(enable_cuda_stream_for_param_groups=False),
        )
        for step in range(8):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            with Recorder(device) as recorder:
                optimizer.step()
            steps.append(recorder.operations)
    return steps


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("name", IN_A_REFRESH)
def test_steps_of_a_kind_differ_in_learning_rate_and_bias_corrections_alone(name, frequency):
    steps = record(name, frequency)
    # Steps count from 1: the last is one with a refresh, and so is that before it if every step is.
    for last, has_refresh in ((-1, True), (-2, frequency == 1)):
        first, second = steps[last - frequency], steps[last]
        assert [operation[0] for operation in first] == [operation[0] for operation in second]
        differing = {b[2] for a, b in zip(first, second, strict=True) if a != b}
        assert differing == IN_EVERY_STEP | (IN_A_REFRESH[name] if has_refresh else set())
