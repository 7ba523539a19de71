"""Every list in several processes: blocks shared as under DDP give what one process gives."""

from __future__ import annotations

import pytest

from tests.distributed import processes
from tests.preconditioners import distributed_workers

pytestmark = pytest.mark.distributed


def test_two_processes_that_share_the_blocks_do_what_one_does(tmp_path) -> None:
    expected = distributed_workers.alone()
    assert len(expected) >= 15
    for results in processes.run(2, distributed_workers.shared, tmp_path):
        for name, params in expected.items():
            for ours, theirs in zip(results[name], params, strict=True):
                error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-3)
                assert float(error) < 1e-8, name


def test_two_processes_that_hold_shards_step(tmp_path) -> None:
    first, second = processes.run(2, distributed_workers.sharded, tmp_path)
    assert len(first) >= 15
    assert first == second
