"""What an accelerator would be asked to do by code that runs on the CPU: launches, waits, memory.

`DeviceCounts` is a context in which chosen tensors say that they are on a CUDA device, and whatever is
computed from them says so too, while they are ordinary CPU tensors with real numbers in them. So the code
under it takes its CUDA branches, and every operation that ATen would launch there is counted:

- a launch is a kernel: views and empty tensors cost none, a product or an elementwise operation one, and
  a `_foreach_*` operation as many as ATen's `multi_tensor_apply` makes of it (a launch takes up to 110, 64,
  48, 36 or 30 tensors where an operation touches 1 to 5 lists, and 320 chunks of 65,536 elements: CUDA
  12); where ATen can't take that path (a tensor is a strided view, or dtypes or layouts differ) one for
  each tensor. Joining tensors takes one for 128 of them, or for 64 if one is a strided view;
- a host synchronisation is a value that is read on the host, a copy between host and device that is not
  told to be `non_blocking`, or an operation that asks the device for a size or a status;
- memory is that of the tensors allocated under the context and still alive.

What this can't see: workspaces inside of kernels, and how many kernels a library call (an
eigendecomposition) makes of its one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.memory import Memory, tensors_in

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
_FREE = {
    "set_",
    "is_pinned",
    "lift_fresh",
    "_unsafe_view",
    "unsafe_split",
    "alias",
    "record_stream",
    "resize_",
}
_FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_", "mv", "dot"}
_PRODUCTS |= {"symmetric_square_", "accumulate_outer_", "two_sided_"}
# Functional forms that copy first, unless they write to what they read, and a matrix that is filled with
# zeros first.
_TWO_KERNELS = {"masked_fill", "baddbmm", "addmm", "eye", "index_copy", "index_put", "index_add"}
_COPIES_ADDEND = {"baddbmm", "addmm"}
_JOINS = {"stack", "cat"}
_WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_linalg_eigh", "linalg_qr"}
_MAX_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_MAX_CHUNKS, _CHUNK = 320, 65536
_MAX_NORMS = 400


@dataclass
class Counts:
    """What was counted, by phase.

    Attributes:
        launches (Counter): Kernel launches.
        waits (Counter): Host synchronisations.
        elements (Counter): Over the launches that are no matrix products, the sum of the elements of
            each one's largest operand.
        operations (Counter): Launches by (phase, operation).
        peak_bytes (int): Most memory that was alive at a time.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    peak_bytes: int = 0


class DeviceCounts:
    """A context in which tensors are on a pretended CUDA device; see the module.

    Args:
        phases: Phases by regular expressions of qualified function names; the innermost function on
            the stack that one matches decides, and of several expressions the first.
        default: The phase of everything else.
    """

    def __init__(self, phases: Mapping[str, str], default: str) -> None:
        self.counts = Counts()
        self._phases = {re.compile(pattern): phase for pattern, phase in phases.items()}
        self._default = default
        self._phase_of_code: dict[CodeType, str | None] = {}
        self._memory = Memory()
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        # That of an H100: kernels that need a capability are taken.
        capability = mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))
        self._modes.enter_context(capability)
        self._modes.enter_context(_Pretend(self))
        self._modes.enter_context(_Count(self))
        return self

    def __exit__(self, *details: Any) -> None:
        self._modes.close()

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Puts tensors on the device."""
        for tensor in tensors:
            tensor.untyped_storage().is_on_pretended_device = True  # type: ignore[attr-defined]

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return hasattr(tensor.untyped_storage(), "is_on_pretended_device")

    def reset(self) -> None:
        """Counts from zero; what is allocated already is no longer counted."""
        self.counts, self._memory = Counts(), Memory()

    def wait(self) -> None:
        """Counts a host synchronisation."""
        self.counts.waits[self._phase()] += 1

    def record(self, name: str, arguments: Any, result: Any) -> None:
        """Counts an operation on the device, and keeps account of what it allocated.

        Args:
            name: ATen's name of it.
            arguments: Its arguments, nested in any way.
            result: What it returned.
        """
        outputs = tensors_in(result)
        # What is written in place stays where it is, such as the host's copy of a value.
        on_host = {t.untyped_storage()._cdata for t in tensors_in(arguments) if not self.has(t)}
        for tensor in outputs:
            if not self.has(tensor) and (
                name != "copy_" or tensor.untyped_storage()._cdata not in on_host
            ):
                if name != "set_":
                    self._memory.add(tensor)
                self.place([tensor])
        self.counts.peak_bytes = self._memory.peak
        operands = tensors_in(arguments)
        number = _num_launches(name, arguments, operands, outputs)
        phase = self._phase()
        counts = self.counts
        counts.launches[phase] += number
        counts.operations[phase, name] += number
        if name.startswith("_foreach_"):
            counts.elements[phase] += max(sum(t.numel() for t in ts) for ts in _lists(arguments))
        elif name not in _PRODUCTS:
            largest = max((tensor.numel() for tensor in (*operands, *outputs)), default=0)
            counts.elements[phase] += number * largest
        elif number == 2:  # the addend is copied
            counts.elements[phase] += outputs[0].numel()
        from_host = (
            name == "copy_" and not all(map(self.has, operands)) and arguments[-1] is not True
        )
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in operands[1:])
        if name in _WAITS or from_host or by_mask:
            self.wait()

    def _phase(self) -> str:
        frame: FrameType | None = sys._getframe(2) if self._phases else None
        while frame is not None:
            code = frame.f_code
            if code not in self._phase_of_code:
                found = (
                    p for pattern, p in self._phases.items() if pattern.search(code.co_qualname)
                )
                self._phase_of_code[code] = next(found, None)
            if phase := self._phase_of_code[code]:
                return phase
            frame = frame.f_back
        return self._default


class _Pretend(TorchFunctionMode):
    """Says `cuda` of the tensors that are there, and takes that device where a tensor is made."""

    def __init__(self, counts: DeviceCounts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        counts = self._counts
        is_there = bool(args) and isinstance(args[0], Tensor) and counts.has(args[0])
        if function in _ANSWERS:
            return _ANSWERS[function] if is_there else function(*args, **kwargs)
        if function in (Tensor.cpu, Tensor.cuda, Tensor.to):
            return self._move(function, is_there, args, dict(kwargs))
        if function in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and is_there:
            counts.wait()
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "cpu":
            return function(*args, **kwargs)
        made = function(*args, **{**kwargs, "device": CPU})
        if function in (torch.tensor, torch.as_tensor):
            # Values of the host: copied, which waits.
            counts.wait()
        counts.record(function.__name__, (), made)
        return made

    def _move(self, function: Any, is_there: bool, args: Any, kwargs: Any) -> Tensor:
        """A tensor in another dtype, or copied between host and device, which waits."""
        tensor: Tensor = args[0]
        copy, may_wait = kwargs.pop("copy", False), not kwargs.get("non_blocking", False)
        if function is Tensor.to:
            like = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)), None)
            if like is not None:
                device: torch.device | None = CUDA if self._counts.has(like) else CPU
                dtype = like.dtype
            else:
                device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            tensor = tensor.to(dtype or tensor.dtype, copy=copy)
        else:
            device = CPU if function is Tensor.cpu else CUDA
        if device is None or (device.type == "cuda") == is_there:
            return tensor
        if may_wait:
            self._counts.wait()
        # Not dispatched to the counting: a copy from the device is on the host.
        with _disable_current_modes():
            moved = tensor.detach().clone()
        if device.type == "cuda":
            self._counts.record("copy", (), moved)
        return moved


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that have an operand on the device."""

    def __init__(self, counts: DeviceCounts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view and any(map(self._counts.has, tensors_in((args, kwargs)))):
            self._counts.record(function.overloadpacket.__name__, (*args, *kwargs.values()), result)
        return result


_ANSWERS: dict[Any, Any] = {
    Tensor.device.__get__: CUDA,
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: 0,
}


def _num_launches(name: str, arguments: Any, operands: list[Tensor], outputs: list[Tensor]) -> int:
    if name in _FREE or (outputs and not any(tensor.numel() for tensor in outputs)):
        return 0
    if name.startswith("_foreach_"):
        lists = _lists(arguments)
        is_norm = name == "_foreach_norm"
        if not (name.endswith("_") or is_norm):
            lists.append(outputs)
        if not _is_fast(lists):
            return len(lists[0])
        number = _multi_tensor_apply(lists[0], len(lists))
        # A buffer of zeros for the norms of the chunks, and kernels that add them up.
        return number + 1 + -(-len(outputs) // _MAX_NORMS) if is_norm else number
    if name in _JOINS:
        return -(-len(operands) // (128 if all(t.is_contiguous() for t in operands) else 64))
    if name in _COPIES_ADDEND and outputs[0].data_ptr() == operands[0].data_ptr():
        return 1
    return 2 if name in _TWO_KERNELS else 1


def _is_fast(lists: list[list[Tensor]]) -> bool:
    """Whether ATen takes its kernels for many tensors: equal and dense layouts, one dtype."""
    return all(
        tensor.dtype == lists[0][0].dtype
        and tensor.size() == first.size()
        and tensor.stride() == first.stride()
        and torch._prims_common.is_non_overlapping_and_dense_or_false(tensor)
        for tensors in lists
        for tensor, first in zip(tensors, lists[0], strict=True)
    )


def _multi_tensor_apply(tensors: list[Tensor], depth: int) -> int:
    """The launches in which ATen works off the chunks of tensors."""
    launches = num_tensors = num_chunks = 0
    for tensor in tensors:
        remaining = -(-tensor.numel() // _CHUNK)
        num_tensors += bool(remaining)
        while remaining:
            taken = min(remaining, _MAX_CHUNKS - num_chunks)
            num_chunks += taken
            remaining -= taken
            if num_chunks == _MAX_CHUNKS or (not remaining and num_tensors == _MAX_TENSORS[depth]):
                launches += 1
                # What is left of a tensor begins the next launch.
                num_tensors, num_chunks = int(remaining > 0), 0
    return launches + (num_chunks > 0)


def _lists(arguments: Any) -> list[list[Tensor]]:
    """The lists of tensors among the arguments of a foreach operation."""
    return [list(a) for a in arguments if isinstance(a, (list, tuple)) and isinstance(a[0], Tensor)]
