"""How a stack is cut, and on which threads its parts are solved: the one rule for all solvers.

On every device a chunk with the solver's workspace stays under the cap. On the CPU it should also stay in
a core's cache, since elementwise passes over more than that wait for memory; and chunks run side by side
where one alone does not occupy all threads: torch's batched `eigh` loops over the matrices on one thread,
and products of small matrices gain little from a second one. Both release the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from dash_shampoo.products import plain_products

NO_CAP = 2**62
_T = TypeVar("_T")

# What a core's second-level cache and its share of the third keep at hand, in bytes.
_CACHE_BYTES = 2**22
# The size above which a single product keeps all threads busy by itself.
_MAX_SERIAL_SIZE = 192
# More chunks than threads, so that a thread that was held up leaves less behind.
_CHUNKS_PER_THREAD = 4
# Below this many N³ in all, about a millisecond, a chunk of its own costs more than it saves.
_MIN_WORK = 2**20

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _forget_pools() -> None:
    """Threads do not survive a fork; the child starts its own."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


@dataclass(frozen=True)
class Chunks:
    """The parts of a stack.

    Attributes:
        rows (tuple): Consecutive slices that cover range(B).
        num_threads (int): How many of them are worked on at once.
    """

    rows: tuple[slice, ...]
    num_threads: int


def plan_chunks(
    num_matrices: int,
    size: int,
    *,
    itemsize: int,
    num_stacks: int,
    device_type: str,
    is_serial: bool,
    max_workspace_bytes: int,
    num_threads: int,
) -> Chunks:
    """Cut a stack.

    Args:
        num_matrices: B >= 1.
        size: N >= 1.
        itemsize: Bytes of an entry.
        num_stacks: N×N matrices that are held for each matrix of a chunk, input and output included.
        device_type: "cpu", "cuda", …
        is_serial: Whether the solver occupies one thread alone, whatever N is.
        max_workspace_bytes: Cap on what all chunks that are worked on at once hold together; at least
            one matrix is taken in any case.
        num_threads: Threads of the CPU.

    Returns:
        The chunks. On the CPU the rows of matrices of odd size come in fours: MKL's kernels sum in another
        order for a matrix that is not aligned to 16 bytes, and no result may depend on the threads.

    Examples:
        >>> options = dict(itemsize=4, num_stacks=8, device_type="cpu", is_serial=False)
        >>> plan_chunks(64, 64, max_workspace_bytes=2**30, num_threads=2, **options).rows[:2]
        (slice(0, 8, None), slice(8, 16, None))
        >>> plan_chunks(8, 16, max_workspace_bytes=2**30, num_threads=2, **options).rows
        (slice(0, 8, None),)
    """
    per_row = num_stacks * size * size * itemsize
    rows = max(max_workspace_bytes // per_row, 1)
    if device_type != "cpu":
        return Chunks(_slices(num_matrices, min(rows, num_matrices)), 1)
    is_split = num_threads > 1 and (is_serial or size <= _MAX_SERIAL_SIZE)
    wanted = max(_CACHE_BYTES // per_row, -(-_MIN_WORK // size**3), 1)
    if is_split:
        share = -(-num_matrices // (num_threads * _CHUNKS_PER_THREAD))
        wanted = min(wanted, max(share, -(-_MIN_WORK // size**3)))
    wanted = min(wanted, num_matrices)
    if size % 2 == 1:
        wanted = -(-wanted // 4) * 4
    # As many at once as the cap has room for, smaller chunks rather than fewer threads.
    at_once = min(num_threads if is_split else 1, -(-num_matrices // min(wanted, rows)), rows)
    wanted = min(wanted, rows // at_once)
    if size % 2 == 1:
        wanted = max(wanted // 4 * 4, min(wanted, 4))
    return Chunks(_slices(num_matrices, wanted), at_once)


def _slices(num_matrices: int, rows: int) -> tuple[slice, ...]:
    starts = range(0, num_matrices, rows)
    return tuple(slice(start, min(start + rows, num_matrices)) for start in starts)


def over_chunks(
    function: Callable[[slice], _T],
    num_matrices: int,
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_stacks: int,
    is_serial: bool,
    max_workspace_bytes: int = NO_CAP,
) -> list[_T]:
    """Call a function for the rows of each chunk of a stack, without gradients and with `plain_products`.

    Args:
        function: As of `map_chunks`.
        num_matrices: B.
        size: N.
        dtype: Of the matrices.
        device: Of the matrices.
        num_stacks: As of `plan_chunks`.
        is_serial: See there.
        max_workspace_bytes: See there. Default: none.

    Returns:
        The results in the order of the chunks.
    """
    chunks = plan_chunks(
        num_matrices,
        size,
        itemsize=dtype.itemsize,
        num_stacks=num_stacks,
        device_type=device.type,
        is_serial=is_serial,
        max_workspace_bytes=max_workspace_bytes,
        num_threads=torch.get_num_threads(),
    )
    with torch.no_grad(), plain_products(device, size**3):
        return map_chunks(function, chunks)


def joined(parts: Sequence[_T]) -> _T:
    """The results of consecutive rows, of one dataclass, as one; what is no tensor is the same in all."""
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {}
    for field in fields(parts[0]):  # type: ignore[arg-type]
        of_parts = [getattr(part, field.name) for part in parts]
        is_tensor = isinstance(of_parts[0], Tensor)
        values[field.name] = torch.cat(of_parts) if is_tensor else of_parts[0]
    return type(parts[0])(**values)


def map_chunks(function: Callable[[slice], _T], chunks: Chunks) -> list[_T]:
    """Call a function for each chunk, on its threads.

    Args:
        function: Takes the rows of one chunk. Must not call `map_chunks` itself.
        chunks: The chunks.

    Returns:
        The results in the order of the chunks.
    """
    if chunks.num_threads == 1 or len(chunks.rows) == 1:
        return [function(rows) for rows in chunks.rows]
    return list(_pool(chunks.num_threads).map(_in_this_mode(function), chunks.rows))


def _in_this_mode(function: Callable[[slice], _T]) -> Callable[[slice], _T]:
    """Whether gradients are recorded, and inference mode, are settings of each thread."""
    is_inference, is_grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def call(rows: slice) -> _T:
        with torch.inference_mode(is_inference), torch.set_grad_enabled(is_grad):
            return function(rows)

    return call


def _pool(num_threads: int) -> ThreadPoolExecutor:
    with _lock:
        if num_threads not in _pools:
            _pools[num_threads] = ThreadPoolExecutor(num_threads, "dash_shampoo")
        return _pools[num_threads]
