"""A CUDA device that has no data: whatever would read a value from it raises.

Tensors there are torch's fake ones, which know shapes, dtypes and devices, and nothing else. Tensors on the
host are real. So code that runs under it to the end has never waited for the device, whatever its branches.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# A value, shapes that depend on values, and factorizations that report to the host.
_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_linalg_eigh", "linalg_qr"}

# Methods whose operators have other names.
_OPERATORS = {
    "__invert__": "bitwise_not",
    **dict.fromkeys(("__bool__", "__float__", "__int__", "item"), "_local_scalar_dense"),
}
_LACKS_CUDA = "not linked with support for cuda"


class HostReadError(AssertionError):  # no failure of a solver, which would be caught
    """The host would have waited for the device."""


class _WithoutGuards(TorchFunctionMode):
    """Calls operators where a method's own binding switches to the device, which torch may lack."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return _item(*args)
        if func is Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            tensor, index, value = args
            place = _item(tensor, index)
            if isinstance(value, Tensor):
                return torch.ops.aten.copy_.default(place, value)
            return place.fill_(value)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if _LACKS_CUDA not in str(error):
                raise
            name = _OPERATORS.get(func.__name__, func.__name__)
            return getattr(torch.ops.aten, name)(*args, **kwargs)


def _item(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`, for all that is no mixture of tensors with anything but full slices."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = parts.index(Ellipsis)
        taken = sum(part is not None for part in parts) - 1
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    dim, tensors = 0, []
    for part in parts:
        if isinstance(part, Tensor):
            tensors = [*tensors, *[None] * (dim - len(tensors)), part]
            dim += 1
        elif part is None:
            tensor = tensor.unsqueeze(dim)
            dim += 1
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        else:
            tensor = tensor.select(dim, int(part))
    return torch.ops.aten.index.Tensor(tensor, tensors) if tensors else tensor


class _Fakes(FakeTensorMode):
    """Meta's base copies tensors deeply, and what their `fake_mode` is with them."""

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class FakeDevice(TorchDispatchMode):
    """A context in which CUDA tensors are fake, and those of the host real.

    Attributes:
        allowed_reads (int): How many more reads are let through; any other raises. A copy gives zeros, and
            `nonzero` finds nothing.
        num_operations (int): Operations that the device was given.
        num_late_reads (int): Copies to the host that nobody waited for; they give zeros, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allowed_reads = self.num_operations = self.num_late_reads = 0
        self._contexts = ExitStack()

    def __enter__(self) -> Self:
        # That of an H100, as no real device can be asked.
        capability = mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))
        self._contexts.enter_context(capability)
        self._contexts.enter_context(_Fakes(allow_non_fake_inputs=True))
        self._contexts.enter_context(_WithoutGuards())
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._contexts.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        is_there = any(isinstance(t, FakeTensor) for t in tree_iter((args, kwargs)))
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if not is_there and target != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        by_mask = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_iter(args[1])
        )
        if name in _READS or by_mask or target == "cpu":
            self._count_read(name)
            if name == "nonzero":
                return torch.ops.aten.new_empty(args[0], (0, args[0].dim()), dtype=torch.int64)
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            if args[2:] == (True,):
                self.num_late_reads += 1
            else:
                self._count_read(name)
            with unset_fake_temporarily():
                return args[0].zero_()
        self.num_operations += 1
        return _call(func, args, kwargs)

    def _count_read(self, name: str) -> None:
        if self.allowed_reads == 0 or name not in ("nonzero", "copy_", "_to_copy"):
            raise HostReadError(f"{name} waits for the device.")
        self.allowed_reads -= 1


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        out = kwargs.pop("out", None)
        if _LACKS_CUDA not in str(error) or out is None:
            raise
        # A decomposition that copies into `out` in the end.
        result = func._overloadpacket(*args, **kwargs)
        assert result.shape == out.shape
        return out
