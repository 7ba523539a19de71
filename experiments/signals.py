"""Stopping a run by Ctrl-C, or by the SIGTERM of a batch scheduler, at the end of a step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Context in which SIGINT and SIGTERM are remembered instead of ending the process.

    The training loop asks at the end of each step and leaves with a checkpoint. A second signal
    has its usual effect at once.

    Attributes:
        signal_number: The signal that came, or None.
    """

    signal_number: int | None = None

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the former handlers back."""
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
