"""Work on a CUDA device that is put into graphs: one for each kind of it, recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

_T = TypeVar("_T")

MAX_KINDS = 128
"""How many kinds are kept; of more than that, those that were not wanted for longest are forgotten."""


class CudaRecorder:
    """Records CUDA graphs that share their memory, so that no two of them may be replayed at once.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A stream of its own: the workspaces of cuBLAS, which graphs go on to use, are a stream's.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], _T]) -> tuple[Callable[[], None], _T]:
        """Records work, of which nothing is done yet; waits for the device.

        Args:
            work: Launches kernels; must not wait for the device.

        Returns:
            What has the device do the work, in one launch; and what `work` returned, whose tensors are
            those that a replay fills.

        Raises:
            RuntimeError: If the work does what no graph can hold.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            # Other threads (NCCL's watchdog, a loader that pins memory) go on with what they do.
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            result = work()
        return graph.replay, result


@dataclass
class _Kind(Generic[_T]):
    """One kind of work.

    Attributes:
        kept: What holds memory that the graph uses.
        replay: Replays its graph, once there is one.
        result: What the work returned when it was recorded.
    """

    kept: Any
    replay: Callable[[], None] | None = None
    result: _T | None = None


class Graphs(Generic[_T]):
    """Graphs by kind, in one pool of memory.

    Whoever runs work must be done with its result before he runs other work.

    Args:
        device: Where the work is done.

    Attributes:
        num_captures (int): How many graphs were recorded so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorder: CudaRecorder | None = None
        self._kinds: dict[Hashable, _Kind[_T]] = {}
        self.num_captures = 0

    def run(self, key: Hashable, work: Callable[[], _T], kept: Any) -> _T:
        """Does work: at the first call of its kind as it is, from the second on as a graph.

        The first call compiles kernels and brings constants to the device, which no graph can hold.

        Args:
            key: The kind: all that decides which kernels are launched, on which memory, and the numbers
                that they are given by the host.
            work: The work; must not wait for the device.
            kept: What holds memory that it uses and that might be released otherwise.

        Returns:
            What the work returns.

        Raises:
            RuntimeError: If the work does what no graph can hold.
        """
        kind = self._kinds.pop(key, None)
        if kind is None:
            kind = _Kind(kept)
            result = work()
        else:
            if kind.replay is None:
                kind.replay, kind.result = self._record(work)
            kind.replay()
            result = kind.result  # type: ignore[assignment]
        self._kinds[key] = kind
        if len(self._kinds) > MAX_KINDS:
            self._kinds.pop(next(iter(self._kinds)))
        return result

    def _record(self, work: Callable[[], _T]) -> tuple[Callable[[], None], _T]:
        if self._recorder is None:
            self._recorder = CudaRecorder(self._device)
        try:
            recorded = self._recorder.record(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"This step can't be put into a CUDA graph ({error}): construct the optimizer without "
                "capturable=True, and report the cause above."
            ) from error
        self.num_captures += 1
        return recorded
