"""DashShampoo on several ranks, on whichever base is in use: what one process does, and whose state it is."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import dash_workers as workers
from tests.distributed.processes import run

pytestmark = pytest.mark.distributed

# Stacks hold other blocks on every rank, so that matmuls may add up in another order.
ROUND_OFF = 1e-5

ONE_BLOCK_EACH = [(8, 8), (5,)]
TWO_ROWS = [(2, 6), (2,)]

TWO_RANKS = {
    f"{kind}, {solver}": (workers.compare, solver, kind, {"mesh_shape": mesh_shape})
    for kind, mesh_shape in (("ddp", None), ("fully_shard", (2,)), ("hybrid_shard", (2, 1)))
    for solver in workers.SOLVERS
}
MESSAGES = {
    "messages, ddp": (workers.messages, "ddp", {}),
    "messages, hybrid_shard": (workers.messages, "hybrid_shard", {"mesh_shape": (2, 1)}),
    "messages, fully_shard": (workers.messages, "fully_shard", {"mesh_shape": (2,)}),
}
FOUR_RANKS = {
    "ddp, default": (workers.compare, "default", "ddp", {}),
    "fully_shard, newton_db": (workers.compare, "newton_db", "fully_shard", {"mesh_shape": (4,)}),
    "hybrid_shard, eigen": (workers.compare, "eigen", "hybrid_shard", {"mesh_shape": (2, 2)}),
    "hybrid_shard, default": (workers.compare, "default", "hybrid_shard", {"mesh_shape": (2, 2)}),
    "ddp, no block": (workers.compare, "default", "ddp", {"shapes": ONE_BLOCK_EACH}),
    "fully_shard, no block": (
        workers.compare,
        "eigen",
        "fully_shard",
        {"shapes": TWO_ROWS, "mesh_shape": (4,)},
    ),
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """By rank, then by case."""
    cases = {**TWO_RANKS, "saved": (workers.saved, "ddp", {}), **MESSAGES}
    return run(2, workers.everything, tmp_path_factory.mktemp("two"), cases)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return run(4, workers.everything, tmp_path_factory.mktemp("four"), FOUR_RANKS)


def check(results, name, mesh_shape):
    """That one process does the same, that replicas are equal, and that no global randomness is drawn."""
    for result in results:
        assert isinstance(result[name], dict), result[name]
    found = [result[name] for result in results]
    num_shards = mesh_shape[-1] if mesh_shape else 1
    for rank, result in enumerate(found):
        states = result["trajectory"]
        assert len(states) == workers.NUM_STEPS
        moved = [not torch.equal(p, q) for p, q in zip(states[0], states[-1], strict=True)]
        assert sum(moved) >= sum(p.numel() > 0 for p in states[0]) / 2
        assert max(result["errors"]) <= ROUND_OFF
        assert max(result["base_errors"]) <= ROUND_OFF
        assert not result["global_generator"]
        first = found[rank % num_shards]
        for ours, theirs in zip(states, first["trajectory"], strict=True):
            assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    return found


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_do_what_one_process_does(name, of_two):
    found = check(of_two, name, TWO_RANKS[name][-1]["mesh_shape"])
    assert all(result["num_blocks"] > 0 for result in found)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_do_what_one_process_does(name, of_four):
    found = check(of_four, name, FOUR_RANKS[name][-1].get("mesh_shape"))
    idle = sum(result["num_blocks"] == 0 for result in found)
    assert idle == (2 if "no block" in name else 0)


def test_a_rank_saves_its_own_state_alone(of_two):
    for result in of_two:
        assert isinstance(result["saved"], dict), result["saved"]
    found = [result["saved"] for result in of_two]
    for result in found:
        sizes = result["bytes"]
        # A view that dragged its whole stack along would show here.
        assert sizes["dash"] <= 1.05 * sizes["base"]
        assert sizes["dash"] <= 0.75 * sizes["alone"]
        assert all(result["dtensors"])
        assert all(result["in_stacks"])
        assert all(result["own_storage"])
        assert result["of_matrices"] == result["of_stacks"] > 0
    assert not found[0]["keys"] & found[1]["keys"]


@pytest.mark.parametrize("name", MESSAGES)
def test_a_step_sends_one_message_for_each_group(name, of_two):
    for result in of_two:
        assert isinstance(result[name], list), result[name]
        # The first step may compare the replicas' parameters, too.
        gathers = 0 if "fully_shard" in name else 2
        assert result[name][1:] == [["_allgather_base_"] * gathers] * (workers.NUM_STEPS - 1)
