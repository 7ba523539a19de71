"""Chunks of a stack on several CPU threads: the same bits, in order, from any thread."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dash_shampoo.base import CoupledNewtonConfig, EigenConfig
from dash_shampoo.inverse_root import (
    ChebyshevConfig,
    MinimaxConfig,
    NewtonDBConfig,
    inverse_root,
)
from dash_shampoo.inverse_root.chunks import Chunks, map_chunks, plan_chunks
from tests.reference.inverse_root import random_spd


@contextmanager
def _num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan(num_matrices: int, size: int, **changes: object) -> Chunks:
    options: dict[str, object] = {
        "itemsize": 4,
        "num_stacks": 8,
        "device_type": "cpu",
        "is_serial": False,
        "max_workspace_bytes": 2**62,
        "num_threads": 2,
    }
    return plan_chunks(num_matrices, size, **(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        EigenConfig(),
        CoupledNewtonConfig(),
        NewtonDBConfig(),
        ChebyshevConfig(degree=20),
        MinimaxConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize(("num_matrices", "size"), [(37, 64), (9, 101), (500, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_splitting_the_stack_changes_nothing(
    monkeypatch, config, num_matrices, size, dtype
) -> None:
    """Compared at one number of threads: MKL's own results depend on that, split or not."""
    A = random_spd(num_matrices, size, 1e2, torch.Generator().manual_seed(0)).to(dtype)
    A[::5] += torch.eye(size, dtype=dtype)
    A[3] = torch.nan
    with _num_threads(2):
        assert len(_plan(num_matrices, size, itemsize=A.element_size()).rows) > 1
        split = inverse_root(A, 4, config)
        one_chunk = Chunks((slice(0, num_matrices),), 1)
        monkeypatch.setattr(
            "dash_shampoo.inverse_root.chunks.plan_chunks", lambda *args, **kwargs: one_chunk
        )
        whole = inverse_root(A, 4, config)
    assert torch.equal(whole.value.nan_to_num(7.0), split.value.nan_to_num(7.0))
    assert torch.equal(whole.status, split.status)
    assert torch.equal(whole.iterations, split.iterations)


@pytest.mark.parametrize("cap", [1, 2**20, 2**24, 2**62])
def test_chunks_cover_the_rows_once_under_the_cap(cap) -> None:
    choices = (
        [1, 2, 7, 64, 1001],
        [1, 31, 64, 2048],
        [1, 2, 16],
        [4, 8],
        ["cpu", "cuda"],
        [False, True],
    )
    for case in itertools.product(*choices):
        num_matrices, size, num_threads, itemsize, device_type, is_serial = case
        plan = _plan(
            num_matrices,
            size,
            itemsize=itemsize,
            num_threads=num_threads,
            max_workspace_bytes=cap,
            is_serial=is_serial,
            device_type=device_type,
        )
        covered = [i for rows in plan.rows for i in range(num_matrices)[rows]]
        assert covered == list(range(num_matrices)), case
        per_row = 8 * size**2 * itemsize
        largest = max(rows.stop - rows.start for rows in plan.rows)
        assert largest * plan.num_threads * per_row <= max(cap, per_row), case
        assert plan.num_threads <= (num_threads if device_type == "cpu" else 1), case
        if device_type == "cuda":
            expected = -(-num_matrices // max(min(cap // per_row, num_matrices), 1))
            assert len(plan.rows) == expected, case
        elif largest >= 4 or cap == 2**62:
            starts = [rows.start for rows in plan.rows]
            assert all(start * size**2 * itemsize % 16 == 0 for start in starts), case


def test_small_stacks_are_not_cut_and_large_ones_fit_a_cache() -> None:
    assert len(_plan(64, 16).rows) == 1
    for num_threads in (1, 2):
        plan = _plan(1000, 64, num_threads=num_threads)
        assert max(rows.stop - rows.start for rows in plan.rows) * 8 * 64 * 64 * 4 <= 2**22
        assert plan.num_threads == num_threads
    assert _plan(8, 1024).num_threads == 1, "a product of that size occupies all threads"
    assert _plan(8, 1024, is_serial=True).num_threads == 2


def test_results_come_in_the_order_of_the_rows_and_errors_come_out() -> None:
    rows = tuple(slice(i, i + 1) for i in range(50))
    for num_threads in (1, 3):
        chunks = Chunks(rows, num_threads)
        assert map_chunks(lambda part: part.start, chunks) == list(range(50))
        with pytest.raises(ZeroDivisionError):
            map_chunks(lambda part: 1 // 0, chunks)


def test_threads_are_in_the_caller_s_mode() -> None:
    chunks = Chunks((slice(0, 1), slice(1, 2)), 2)
    with torch.inference_mode():
        assert map_chunks(lambda _: torch.is_inference_mode_enabled(), chunks) == [True, True]
    with torch.no_grad():
        assert map_chunks(lambda _: torch.is_grad_enabled(), chunks) == [False, False]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    """Threads do not survive a fork; a child that waited for the parent's would hang."""
    assert map_chunks(lambda rows: rows.start, _TWO) == [0, 1]
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


_TWO = Chunks((slice(0, 1), slice(1, 2)), 2)


def _map_in_child(queue: multiprocessing.Queue) -> None:
    queue.put(map_chunks(lambda rows: rows.start, _TWO))
