"""Chunks of a stack on several CPU threads, for LAPACK calls that torch runs one after another.

torch's batched `eigh` on the CPU loops over the blocks on one thread, but releases the
interpreter's lock meanwhile; so chunks of the stack can run side by side.
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
# Below this many N³ in all, about a millisecond, a second thread saves nothing.
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


def chunk_rows(num_blocks: int, size: int, num_threads: int) -> list[slice]:
    """Cut the rows of a stack into chunks for the threads; one chunk where that pays more.

    Args:
        num_blocks: B.
        size: N.
        num_threads: Threads that will work.

    Returns:
        Consecutive slices that cover range(B).

    Examples:
        >>> chunk_rows(num_blocks=64, size=64, num_threads=2)[:2]
        [slice(0, 8, None), slice(8, 16, None)]
        >>> chunk_rows(num_blocks=64, size=64, num_threads=1)
        [slice(0, 64, None)]
    """
    if num_threads == 1 or num_blocks * size**3 < _MIN_WORK:
        return [slice(0, num_blocks)]
    rows = -(-num_blocks // (num_threads * _CHUNKS_PER_THREAD))
    if size % 2 == 1:
        # Keep every block's alignment to 16 bytes what it is in the whole stack: MKL's kernels
        # sum in another order where it differs, and results would depend on the threads.
        rows = -(-rows // 4) * 4
    return [slice(start, min(start + rows, num_blocks)) for start in range(0, num_blocks, rows)]


def map_chunks(function: Callable[[slice], _T], num_blocks: int, size: int) -> list[_T]:
    """Call a function for chunks of rows, on `torch.get_num_threads()` threads.

    Args:
        function: Takes the rows of one chunk. Must not call `map_chunks` itself.
        num_blocks: B, the rows of the stack.
        size: N, for the guess at the work.

    Returns:
        The results in the order of the rows.
    """
    num_threads = torch.get_num_threads()
    chunks = chunk_rows(num_blocks, size, num_threads)
    if len(chunks) == 1:
        return [function(chunks[0])]
    return list(_pool(num_threads).map(function, chunks))
