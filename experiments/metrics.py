"""What a run writes down: one JSON object per line, and the clocks that fill it in.

Kinds of records, by their ``event``:

- ``start``: versions, data, number of parameters, the composed settings. Once, first line.
- ``train``: ``step`` (1 is the first), ``loss`` of that step's batch, ``lr``, ``grad_norm`` (null
  without clipping), ``data_ms``, ``forward_ms``, ``backward_ms``, ``clip_ms``, ``optimizer_ms``
  (averages over the steps since the last record), ``seconds`` of training so far (validation and
  checkpoints excluded), ``tokens`` so far, ``tokens_per_second``, ``mfu`` (share of the device's peak,
  null where that is not known), ``peak_memory_mib`` (the largest of all processes).
- ``validation``: ``step`` (0 is before training), ``loss``, ``perplexity``, ``accuracy``, and the same
  of averaged weights (``averaged_loss``, ...), ``seconds``, ``tokens``; of DashShampoo ``failures``
  so far, by parameter.
- ``diagnostics``: of DashShampoo, on request: ``blocks``, as `dash_shampoo.BlockDiagnostics`, and the
  ``largest_condition``, ``largest_residual`` and ``largest_update_to_weight`` of them.
- ``sample``: ``prompt``, and the ``text`` that the model wrote after it.
- ``resume``: ``step`` from which the run was continued, its ``checkpoint``, and what was ``changed``.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends records to a file; lines are whole, since each is written and flushed at once.

    Args:
        path: The file; its folder must exist.
        resume_step: None to start a new file. Otherwise the file is kept up to this step, and
            what an interrupted run wrote past its checkpoint is dropped.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            kept = [r for r in read_metrics(path) if _precedes(r, resume_step)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """Append one record.

        Args:
            event: Its kind.
            **values: JSON values; floats that are not finite become null.
        """
        self._file.write(_line({"event": event, **values}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _precedes(record: dict[str, Any], resume_step: int) -> bool:
    if record["event"] == "resume":
        return bool(record["step"] < resume_step)
    return bool(record.get("step", 0) <= resume_step)


def _line(record: dict[str, Any]) -> str:
    # NaN is not JSON; readers in other languages refuse the whole file for one.
    plain = {k: None if _is_non_finite(v) else v for k, v in record.items()}
    return json.dumps(plain, allow_nan=False, default=str) + "\n"


def _is_non_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file.

    Args:
        path: The file. A last line that was cut off (the machine went down) is left out.

    Returns:
        One dict per line.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


class Stopwatch:
    """Milliseconds of the named parts of a step, without stopping a GPU in between.

    On CUDA, events are recorded in the stream and read out in `read`, which waits for the device
    once; elsewhere the wall clock is read.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._use_events = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time of the ``with`` block towards a part.

        Args:
            part: Its name.

        Yields:
            Nothing.
        """
        start = self._mark()
        yield
        self._spans.setdefault(part, []).append((start, self._mark()))

    def _mark(self) -> Any:
        if not self._use_events:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(self, steps: int = 1) -> dict[str, float]:
        """The milliseconds per part since the last call, in the order of first use.

        Args:
            steps: Number of steps since then, over which to average.

        Returns:
            ``{"<part>_ms": milliseconds}``.
        """
        if self._use_events:
            torch.cuda.synchronize()
        totals = {
            f"{part}_ms": sum(
                start.elapsed_time(end) if self._use_events else 1e3 * (end - start)
                for start, end in spans
            )
            / steps
            for part, spans in self._spans.items()
        }
        self._spans.clear()
        return totals


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory use so far: of torch's allocator on CUDA, else of the whole process.

    Args:
        device: Where the work runs.

    Returns:
        MiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
