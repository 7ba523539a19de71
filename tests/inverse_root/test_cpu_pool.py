"""Chunks of a stack on several CPU threads: the same bits, in order, from any thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dash_shampoo.base import CoupledNewtonConfig, EigenConfig
from dash_shampoo.config import ChebyshevConfig, NewtonDBConfig
from dash_shampoo.inverse_root import dispatch, inverse_root
from dash_shampoo.inverse_root.cpu_pool import chunk_rows, map_chunks
from tests.reference.inverse_root import random_spd


@contextmanager
def _num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "config",
    [
        EigenConfig(),
        CoupledNewtonConfig(),
        NewtonDBConfig(),
        ChebyshevConfig(degree=20),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize(("num_blocks", "size"), [(37, 64), (9, 101), (500, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_splitting_the_stack_changes_nothing(monkeypatch, config, num_blocks, size, dtype) -> None:
    """Compared at one number of threads: MKL's own results depend on that, split or not."""
    A = random_spd(num_blocks, size, 1e2, torch.Generator().manual_seed(0)).to(dtype)
    A[::5] += torch.eye(size, dtype=dtype)
    A[3] = torch.nan
    with _num_threads(2):
        assert len(chunk_rows(num_blocks, size, A.element_size(), 2)) > 1
        split = inverse_root(A, 4, config)
        monkeypatch.setattr(dispatch, "_chunks", lambda stack, solver: [slice(0, len(stack))])
        whole = inverse_root(A, 4, config)
    assert torch.equal(whole.value.nan_to_num(7.0), split.value.nan_to_num(7.0))
    assert torch.equal(whole.status, split.status)
    assert torch.equal(whole.iterations, split.iterations)
    if isinstance(config, CoupledNewtonConfig):
        # A part of the stack can drop blocks that are done when the whole doesn't yet.
        assert split.num_matmuls <= whole.num_matmuls + 1e-9
    else:
        assert split.num_matmuls == pytest.approx(whole.num_matmuls)


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 64, 1001])
@pytest.mark.parametrize("size", [1, 31, 64, 2048])
@pytest.mark.parametrize("num_threads", [1, 2, 16])
@pytest.mark.parametrize("element_size", [4, 8])
def test_chunks_cover_the_rows_once_and_keep_alignment(
    num_blocks, size, num_threads, element_size
) -> None:
    chunks = chunk_rows(num_blocks, size, element_size, num_threads)
    rows = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert rows == list(range(num_blocks))
    assert all(chunk.start * size * size * element_size % 16 == 0 for chunk in chunks)


def test_small_stacks_are_not_cut_and_large_ones_fit_a_cache() -> None:
    assert len(chunk_rows(64, 16, 4, 2)) == 1
    for num_threads in (1, 2):
        chunks = chunk_rows(1000, 64, 4, num_threads)
        assert max(chunk.stop - chunk.start for chunk in chunks) * 64 * 64 * 4 <= 2**19


def test_results_come_in_the_order_of_the_rows_and_errors_come_out() -> None:
    chunks = [slice(i, i + 1) for i in range(50)]
    for num_threads in (1, 3):
        with _num_threads(num_threads):
            assert map_chunks(lambda rows: rows.start, chunks) == list(range(50))
            with pytest.raises(ZeroDivisionError):
                map_chunks(lambda rows: 1 // 0, chunks)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    """Threads do not survive a fork; a child that waited for the parent's would hang."""
    with _num_threads(2):
        assert map_chunks(lambda rows: rows.start, [slice(0, 1), slice(1, 2)]) == [0, 1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_map_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == [0, 1]
    finally:
        child.join(timeout=10)
        if child.is_alive():
            child.kill()


def _map_in_child(queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(2)
    queue.put(map_chunks(lambda rows: rows.start, [slice(0, 1), slice(1, 2)]))
