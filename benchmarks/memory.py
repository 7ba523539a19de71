"""How much memory the tensors hold that some code allocates: counted, not measured, on any machine.

What this can't see: workspaces inside of kernels, and what other threads allocate.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory:
    """The bytes that are alive of what was added, and the most there were.

    Attributes:
        live (int): Bytes alive.
        peak (int): The most that were alive at a time.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        # Its Python object lives as long as the memory does.
        weakref.finalize(storage, self._free, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts the memory of all tensors that are made in it.

    Attributes:
        memory (Memory): The counts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = Memory()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view:
            old = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
            for tensor in tensors_in(result):
                if id(tensor.untyped_storage()) not in old:
                    old.add(id(tensor.untyped_storage()))
                    self.memory.add(tensor)
        return result


def memory_of(function: Callable[[], object]) -> Memory:
    """Calls a function and counts the memory that it allocates."""
    allocations = Allocations()
    with allocations:
        function()
    return allocations.memory


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in a nest of containers."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
