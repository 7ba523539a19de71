"""Checkpoints that one rank saves and all load: complete ones resume bit by bit, partial ones are refused."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed import consolidation_workers as workers
from tests.distributed.processes import run


@pytest.mark.parametrize(
    ("kind", "size", "to"),
    [("ddp", 2, 0), ("ddp", 3, 2), ("fully_shard", 2, 0), ("hybrid_shard", 4, 1)],
)
def test_saved_by_one_rank_and_loaded_by_all(kind, size, to, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    (tmp_path / "runs").mkdir()
    results = run(size, workers.saved_by_one, tmp_path / "runs", kind, path, to)
    for rank, result in enumerate(results):
        for found, expected in zip(result["found"], result["expected"], strict=True):
            assert torch.equal(found, expected)
        if rank == to:
            assert result["kinds"] == {"Tensor"}


def test_what_several_ranks_saved_is_loaded_by_one_process(tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    (tmp_path / "runs").mkdir()
    results = run(2, workers.saved_by_one, tmp_path / "runs", "ddp", path, 0)
    model, optimizer = workers.build("one process")
    workers.train(model, optimizer, 0, 3)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.load_state_dict(torch.load(path, weights_only=False))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    found = workers.train(model, optimizer, 3, 6)
    for p, q in zip(found, results[0]["expected"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # stacked with other blocks


def test_a_consolidated_state_is_that_of_its_step_alone(tmp_path):
    first, second = run(2, workers.outdated, tmp_path)
    blocks = [
        {key for key in keys if key.startswith("block_")}
        for keys in map(set.union, *_both(first, second))
    ]
    assert all(first["whole"][n] >= blocks[n] for n in range(len(blocks)))
    assert any(first["partial"][n] != first["whole"][n] for n in range(len(blocks)))
    assert second["partial"] == second["whole"]


def _both(first, second):
    return first["partial"], second["partial"]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("ddp", "saved by one rank alone.*call consolidate_state_dict"),
        ("fully_shard", "saved by other ranks under fully_shard.*as many ranks as saved it"),
    ],
)
def test_a_partial_state_is_refused_with_what_happened(kind, why, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    (tmp_path / "runs").mkdir()
    results = run(2, workers.partial, tmp_path / "runs", kind, path)
    assert results[0]["said"] is None
    error, text = results[1]["said"]
    assert error == "ValueError"
    assert "nothing was changed: it has blocks of other ranks, but lacks" in text
    assert "of this rank 1" in text
    with pytest.raises(ValueError, match=why):
        raise ValueError(text)
    for rank, result in enumerate(results):
        assert result["unchanged"]
        warnings = [record for record in result["records"] if "consolidate_state_dict" in record]
        assert len(warnings) == 1
        assert f"holds the blocks of rank {rank} alone" in warnings[0]


# Shapes of meshes: how many shards, or how many replicas of how many shards; () is one plain process.
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        *(((2,), (1,)), ((2,), (4,)), ((4,), (2,)), ((2,), ()), ((), (2,))),
        *(((2, 2), (2, 1)), ((2, 2), (1, 2)), ((2, 2), (4,)), ((2, 2), ())),
        ((2, 1), (2, 2)),
    ],
)
def test_blocks_that_coincide_are_loaded_on_another_number_of_ranks(saved_by, loaded_by, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    expected = _run(saved_by, workers.saved_in_shards, tmp_path / "saving", path, False)[0]
    for result in _run(loaded_by, workers.loaded_in_shards, tmp_path / "loading", path, False):
        assert result["said"] is None
        assert not result["unchanged"]
        for name, param in expected.items():
            # Stacked with other blocks; a state lost or mixed up is off by whole steps of 0.05.
            torch.testing.assert_close(result["params"][name], param, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        *(((2,), (4,)), ((4,), (2,)), ((2,), ())),
        *(((2, 2), (4,)), ((2, 1), (2, 2))),
    ],
)
def test_blocks_that_differ_are_refused_before_harm_on_all_ranks(saved_by, loaded_by, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    _run(saved_by, workers.saved_in_shards, tmp_path / "saving", path, True)
    for result in _run(loaded_by, workers.loaded_in_shards, tmp_path / "loading", path, True):
        error, text = result["said"]
        assert error == "ValueError"
        assert "'odd.weight' of shape (12, 16) was saved in" in text
        assert "none of the blocks that were saved" in text
        assert result["unchanged"]


def _run(shape, worker, directory, path, with_odd):
    """On a mesh of this shape; () means without `fully_shard`, here."""
    directory.mkdir()
    args = (path, shape, with_odd)
    return run(math.prod(shape), worker, directory, *args) if shape else [worker(0, *args)]
