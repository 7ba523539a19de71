"""Every list in several processes: blocks shared as under DDP give what one process gives."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import processes
from tests.preconditioners import distributed_workers

pytestmark = pytest.mark.distributed


def test_two_processes_that_share_the_blocks_do_what_one_does(tmp_path) -> None:
    expected = distributed_workers.alone()
    assert len(expected) >= 30
    for results in processes.run(2, distributed_workers.shared, tmp_path):
        for name, params in expected.items():
            for ours, theirs in zip(results[name], params, strict=True):
                error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-3)
                assert float(error) < 1e-8, name


def test_replicas_whose_refreshes_are_spread_stay_equal(tmp_path) -> None:
    first, second = processes.run(2, distributed_workers.staggered, tmp_path)
    assert first.keys() == {"dash_staggered", "dash_soap_staggered"}
    for name, params in first.items():
        assert all(bool(param.isfinite().all()) for param in params)
        assert all(map(torch.equal, params, second[name]))


def test_two_processes_that_hold_shards_step(tmp_path) -> None:
    first, second = processes.run(2, distributed_workers.sharded, tmp_path)
    assert len(first) >= 30
    assert first == second


def test_parts_of_rows_that_lie_on_one_rank_are_trained_as_in_one_process(tmp_path) -> None:
    expected = distributed_workers.alone()["parts"]
    for results in processes.run(2, distributed_workers.sharded_parts, tmp_path):
        for ours, theirs in zip(results, expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-8
