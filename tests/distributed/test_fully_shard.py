"""Sharded parameters: local shards as parameters of one process, and shards spread over replicas."""

from __future__ import annotations

import pytest
import torch

import dash_shampoo.base.embedded as embedded
from tests.base.cases import SHAPES, gradients, meta, relative_error, take_steps
from tests.distributed import workers
from tests.distributed.processes import run

pytestmark = pytest.mark.distributed

# fp32, with sums in another order: where gradients lie in memory decides how a matmul adds up.
ROUND_OFF = 1e-6


def expected_of_shards(result, changes):
    """One process with the local shards as its parameters, fed with the shards' gradients."""
    present = [index for index, shard in enumerate(result["first"]) if shard.numel() > 0]
    if not present:
        return
    params = [torch.nn.Parameter(result["first"][index].clone()) for index in present]
    optimizer = embedded.DistributedShampoo(params, **workers.options(**changes))
    for grads, found in result["trajectory"]:
        take_steps(optimizer, params, [[grads[index] for index in present]])
        yield [found[index] for index in present], params


@pytest.mark.parametrize(("size", "averaging"), [(2, None), (3, "schedule_free"), (4, "nesterov")])
def test_local_shards_are_preconditioned_as_parameters(size, averaging, tmp_path):
    changes = {"iterate_averaging_config": workers.AVERAGING[averaging]}
    results = run(size, workers.sharded, tmp_path, (size,), 4, changes)
    # Two rows over three or four ranks: somebody has an empty shard.
    assert any(shard.numel() == 0 for r in results for shard in r["first"]) == (size > 2)
    for rank, result in enumerate(results):
        for found, params in expected_of_shards(result, changes):
            assert all(
                relative_error(p, q) <= ROUND_OFF for p, q in zip(found, params, strict=True)
            )
        assert len(result["keys"]) == len(result["first"])
        for keys, shard in zip(result["keys"], result["first"], strict=True):
            blocks = [key for key in keys if "block" in key]
            assert "step" in keys
            assert bool(blocks) == (shard.numel() > 0)
            assert all(key.startswith(f"rank_{rank}-block_") for key in blocks)


@pytest.mark.parametrize(
    ("shape", "options", "tolerance"),
    [
        ((2, 2), {}, ROUND_OFF),
        ((4, 1), {"num_trainers_per_group": 2, "communicate_params": True}, ROUND_OFF),
        ((2, 1), {"communication_dtype": torch.bfloat16}, 1e-2),
        ((1, 3), {}, ROUND_OFF),
    ],
)
def test_shards_spread_over_replicas(shape, options, tolerance, tmp_path):
    num_replicas, num_shards = shape
    size = num_replicas * num_shards
    results = run(size, workers.sharded, tmp_path, shape, 4, {}, options)
    for rank, result in enumerate(results):
        for found, params in expected_of_shards(result, {}):
            for p, q in zip(found, params, strict=True):
                assert relative_error(p, q) <= tolerance
        replica = results[rank % num_shards]
        for (_, ours), (_, theirs) in zip(result["trajectory"], replica["trajectory"], strict=True):
            assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
        blocks = {key for keys in result["keys"] for key in keys if "block" in key}
        assert all(key.startswith(f"rank_{rank % num_shards}-block_") for key in blocks)
    if num_replicas > 1 and options.get("num_trainers_per_group", -1) == -1:
        for column in range(num_shards):
            owned = [
                {key for key in r["state"] if len(key) > 2} for r in results[column::num_shards]
            ]
            assert sum(map(len, owned)) == len(set().union(*owned))


@pytest.mark.parametrize(("shape", "kind"), [((3,), "fully_shard"), ((2, 2), "hybrid")])
def test_sharded_equals_metas(shape, kind, tmp_path):
    meta()
    size = 3 if kind == "fully_shard" else 4
    steps = gradients(4, "changing", torch.float32)
    results = run(size, workers.sharded_against_meta, tmp_path, shape, SHAPES, steps)
    for result in results:
        ours, theirs = result["states"]
        assert ours.keys() == theirs.keys()
        for p, q in zip(*result["params"], strict=True):
            assert relative_error(p, q) <= 1e-5
        assert all(torch.equal(result["loaded"][key], theirs[key]) for key in theirs)
