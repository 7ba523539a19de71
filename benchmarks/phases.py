"""Where the time of a Shampoo step goes: gather, factors, roots, precondition, graft, communication.

The methods that do the work are timed from outside, on the optimizer's own lists; what one of them calls
is not counted twice. On CUDA events are recorded in the stream, so that the host does not wait.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("gather", "factors", "roots", "precondition", "graft", "communication", "rest")
# Attribute of a group's lists: which of its methods belong to which phase.
_METHODS: dict[str, dict[str, str]] = {
    "distributor": {
        "merge_and_block_gradients": "gather",
        # The exchange of updates, and their addition to the parameters.
        "update_params": "communication",
    },
    "dash_buckets": {"on_buckets": "gather", "to_blocks": "gather"},
    "shampoo_preconditioner_list": {
        "_update_factor_matrices": "factors",
        "_accumulate_all_": "factors",
        # What is left of them: the roots, or eigenvectors.
        "update_preconditioners": "roots",
        "precondition": "precondition",
    },
    "grafting_preconditioner_list": {
        "update_preconditioners": "graft",
        "precondition": "graft",
    },
}


class Clock:
    """Seconds between two moments of a device.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, int, Any, Any]] = []
        self._depth = 0

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Counts the time of the ``with`` block, less what is measured inside of it."""
        start, depth = self._mark(), self._depth
        self._depth += 1
        try:
            yield
        finally:
            self._depth = depth
            self._spans.append((phase, depth, start, self._mark()))

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """The time of every phase so far."""
        if self._on_cuda:
            torch.cuda.synchronize()
        total: Counter[str] = Counter()
        inside = [0.0] * 64  # of finished spans one level deeper, since the level above ended
        for phase, depth, start, end in self._spans:
            spent = start.elapsed_time(end) if self._on_cuda else 1e3 * (end - start)
            total[phase] += spent - inside[depth + 1]
            inside[depth + 1] = 0.0
            inside[depth] += spent
        return dict(total)


@contextmanager
def watched(optimizer: torch.optim.Optimizer, clock: Clock) -> Iterator[None]:
    """Has a clock measure the phases of an optimizer's steps.

    Args:
        optimizer: Of Distributed Shampoo or ours; of others the whole step is the rest.
        clock: The clock.

    Yields:
        Nothing.
    """
    patched: list[tuple[Any, str]] = []
    for lists in getattr(optimizer, "_per_group_state_lists", ()):
        for key, methods in _METHODS.items():
            part = lists.get(key)
            for name, phase in methods.items():
                if part is not None and hasattr(part, name):
                    setattr(part, name, _timed(getattr(part, name), phase, clock))
                    patched.append((part, name))
    try:
        yield
    finally:
        for part, name in patched:
            vars(part).pop(name)


def _timed(function: Callable[..., Any], phase: str, clock: Clock) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.measure(phase):
            return function(*args, **kwargs)

    return timed


def phase_milliseconds(
    optimizer: torch.optim.Optimizer, steps: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds of a step by phase, means over some steps.

    Args:
        optimizer: Its parameters have gradients; it has taken a step.
        steps: How many are taken.
        device: Where they run.

    Returns:
        One number for each of `PHASES`; their sum is a step.
    """
    clock = Clock(device)
    with watched(optimizer, clock):
        for _ in range(steps):
            with clock.measure("rest"):
                optimizer.step()
    found = clock.milliseconds()
    return {phase: found.get(phase, 0.0) / steps for phase in PHASES}
