"""Chunks of a stack on several CPU threads, each small enough to stay in a core's cache.

torch's batched `eigh` on the CPU loops over the blocks on one thread, and elementwise passes over a
large stack wait for memory. Both release the interpreter's lock meanwhile, so chunks of the stack
can run side by side.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")

# More chunks than threads, so that a thread that was held up leaves less behind.
_CHUNKS_PER_THREAD = 4
# A chunk and the solver's workspace of a few of them should fit a core's cache.
_MAX_CHUNK_BYTES = 2**19
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


def _pool(num_threads: int) -> ThreadPoolExecutor:
    with _lock:
        if num_threads not in _pools:
            _pools[num_threads] = ThreadPoolExecutor(num_threads, "dash_shampoo_eigen")
        return _pools[num_threads]


def chunk_rows(
    num_blocks: int,
    size: int,
    element_size: int,
    num_threads: int,
    max_chunk_bytes: int = _MAX_CHUNK_BYTES,
) -> list[slice]:
    """Cut the rows of a stack into chunks; one chunk where that pays more.

    Args:
        num_blocks: B.
        size: N.
        element_size: Bytes of an entry.
        num_threads: Threads that will work.
        max_chunk_bytes: Largest chunk. One above the default gives each thread a single chunk, for
            a solver whose calls take longer than their tail.

    Returns:
        Consecutive slices that cover range(B).

    Examples:
        >>> chunk_rows(num_blocks=64, size=64, element_size=4, num_threads=2)[:2]
        [slice(0, 8, None), slice(8, 16, None)]
        >>> chunk_rows(num_blocks=8, size=16, element_size=4, num_threads=2)
        [slice(0, 8, None)]
    """
    per_thread = _CHUNKS_PER_THREAD if max_chunk_bytes <= _MAX_CHUNK_BYTES else 1
    rows = -(-num_blocks // (num_threads * per_thread)) if num_threads > 1 else num_blocks
    rows = max(min(rows, max_chunk_bytes // (size * size * element_size)), 1)
    rows = max(rows, -(-_MIN_WORK // size**3))
    if size % 2 == 1:
        # Keep every block's alignment to 16 bytes what it is in the whole stack: MKL's kernels
        # sum in another order where it differs, and results would depend on the threads.
        rows = -(-rows // 4) * 4
    return [slice(start, min(start + rows, num_blocks)) for start in range(0, num_blocks, rows)]


def map_chunks(function: Callable[[slice], _T], chunks: list[slice]) -> list[_T]:
    """Call a function for each chunk of rows, on `torch.get_num_threads()` threads.

    Args:
        function: Takes the rows of one chunk. Must not call `map_chunks` itself.
        chunks: Rows.

    Returns:
        The results in the order of the chunks.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(chunks) == 1:
        return [function(chunk) for chunk in chunks]
    return list(_pool(num_threads).map(function, chunks))
