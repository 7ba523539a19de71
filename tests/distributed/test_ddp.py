"""Replicated parameters: the blocks' owners, one all-gather, against one process and Meta's package."""

from __future__ import annotations

import pytest
import torch

import dash_shampoo.base.embedded as embedded
from tests.base.cases import SHAPES, gradients, meta, parameters, relative_error, take_steps
from tests.distributed import workers
from tests.distributed.processes import run

pytestmark = pytest.mark.distributed

DDP = embedded.DDPDistributedConfig


def one_process(shapes, steps, changes):
    """Parameters after each step, and the optimizer."""
    params = parameters(torch.float32, shapes)
    optimizer = embedded.DistributedShampoo(params, **workers.options(**changes))
    trajectory = []
    for grads in steps:
        take_steps(optimizer, params, [grads])
        trajectory.append([p.detach().clone() for p in params])
    if isinstance(changes.get("iterate_averaging_config"), embedded.ScheduleFreeConfig):
        for mode in ("eval", "train"):
            getattr(optimizer, mode)()
            trajectory.append([p.detach().clone() for p in params])
    return trajectory, optimizer


def assert_replicas_are_equal(results):
    for result in results[1:]:
        for ours, theirs in zip(result["trajectory"], results[0]["trajectory"], strict=True):
            assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


# World size, config, missing gradients, averaging; tolerance where it is not exact: the updates are rounded
# to 8 or 11 bits, and lr is 0.1.
CASES = [
    (2, DDP(), "never", None, 0.0),
    (3, DDP(), "changing", "nesterov", 0.0),
    (4, DDP(num_trainers_per_group=2), "some", "schedule_free", 0.0),
    (2, DDP(num_trainers_per_group=1), "never", None, 0.0),
    (3, DDP(communicate_params=True), "changing", "schedule_free", 0.0),
    (2, DDP(communication_dtype=torch.bfloat16), "changing", None, 1e-2),
    (2, DDP(communication_dtype=torch.float16), "never", "schedule_free", 1e-2),
    (2, DDP(communication_dtype=torch.float16, communicate_params=True), "some", None, 1e-2),
]


@pytest.mark.parametrize(("size", "config", "missing", "averaging", "tolerance"), CASES)
def test_sharded_equals_one_process(size, config, missing, averaging, tolerance, tmp_path):
    changes = {"iterate_averaging_config": workers.AVERAGING[averaging]}
    steps = gradients(5, missing, torch.float32)
    expected, optimizer = one_process(SHAPES, steps, changes)
    results = run(size, workers.replicated, tmp_path, SHAPES, steps, config, changes)
    assert_replicas_are_equal(results)
    for found, params in zip(results[0]["trajectory"], expected, strict=True):
        for p, q in zip(found, params, strict=True):
            assert relative_error(p, q) <= tolerance

    whole = workers.plain_state(optimizer)
    group_size = size if config.num_trainers_per_group == -1 else config.num_trainers_per_group
    group = results[:group_size]
    assert set().union(*(result["after"] for result in group)) == set(whole)
    for result in group:
        for key, value in result["after"].items():
            assert value.shape == whole[key].shape
            assert value.dtype == whole[key].dtype
            if tolerance == 0.0:
                assert torch.equal(value, whole[key]), key


def test_states_have_the_same_parameters_on_every_rank_before_the_first_step(tmp_path):
    results = run(3, workers.replicated, tmp_path, SHAPES, [], DDP(), {})
    shared = {("step",)}
    for result in results:
        assert result["ids"] == list(range(len(SHAPES)))
        assert {key[1:] for key in result["before"] if len(key) == 2} == shared
    blocks = [{key for key in result["before"] if len(key) > 2} for result in results]
    assert all(blocks)
    assert not blocks[0] & blocks[1]
    assert not blocks[0] & blocks[2]
    assert not blocks[1] & blocks[2]


def test_ranks_may_own_nothing(tmp_path):
    shapes = [(8, 8), (5,)]
    steps = gradients(3, "changing", torch.float32, shapes)
    expected, _ = one_process(shapes, steps, {})
    results = run(4, workers.replicated, tmp_path, shapes, steps, DDP(), {})
    assert sorted(result["num_blocks"] for result in results) == [0, 0, 1, 1]
    assert_replicas_are_equal(results)
    for found, params in zip(results[0]["trajectory"], expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(found, params, strict=True))


@pytest.mark.parametrize("drop", range(4))
def test_replicas_stay_equal_when_they_disagree_on_missing_gradients(drop, tmp_path):
    shapes = [(8, 8), (5,), (12, 3), (2,)]
    steps = gradients(3, "never", torch.float32, shapes)
    results = run(2, workers.replicated, tmp_path, shapes, steps, DDP(), {}, drop)
    assert_replicas_are_equal(results)


@pytest.mark.parametrize("wrapper", ["ddp", "replicate"])
def test_models_are_trained(wrapper, tmp_path):
    results = run(2, workers.trained_model, tmp_path, wrapper)
    net = workers.Net()
    params = list(net.parameters())
    optimizer = embedded.DistributedShampoo(params, **workers.options())
    for (grads, found), (_, other) in zip(*results, strict=True):
        take_steps(optimizer, params, [grads])
        assert all(torch.equal(p, q) for p, q in zip(found, other, strict=True))
        # Where a gradient lies in memory decides how a matmul adds up: rounding of fp32.
        assert all(relative_error(p, q) <= 1e-6 for p, q in zip(found, params, strict=True))


@pytest.mark.parametrize(("saving", "loading"), [(2, 2), (2, 3), (3, 1)])
def test_resuming_on_any_number_of_processes(saving, loading, tmp_path):
    steps = gradients(6, "changing", torch.float32)
    expected, _ = one_process(SHAPES, steps, {})
    path = str(tmp_path / "checkpoint")
    if saving == loading:
        results = run(saving, workers.resumed, tmp_path, SHAPES, steps, DDP(), path, None)
    else:
        run(saving, workers.resumed, tmp_path, SHAPES, steps, DDP(), path, "save")
        results = run(loading, workers.resumed, tmp_path, SHAPES, steps, DDP(), path, "load")
    for result in results:
        assert all(torch.equal(p, q) for p, q in zip(result, expected[-1], strict=True))


@pytest.mark.parametrize(
    ("size", "arguments"),
    [
        (2, {}),
        (3, {"communicate_params": True}),
        # Not with several groups: there Meta's processes create groups of different ranks under the same
        # name, which gloo mixes up now and then.
        (2, {"communication_dtype": torch.bfloat16}),
    ],
)
def test_ddp_equals_metas(size, arguments, tmp_path):
    meta()
    steps = gradients(4, "changing", torch.float32)
    results = run(
        size, workers.against_meta, tmp_path, SHAPES, steps, "DDPDistributedConfig", arguments
    )
    for result in results:
        ours, theirs = result["states"]
        # The owners agree, as every rank has the same keys in both.
        assert ours.keys() == theirs.keys()
        assert result["dtensors"][0] == result["dtensors"][1]
        for p, q in zip(*result["params"], strict=True):
            assert relative_error(p, q) <= 1e-5
        assert all(torch.equal(result["loaded"][key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("model", ["memory", "polynomial"])
def test_owners_are_those_of_meta(model):
    meta()
    from distributed_shampoo.shampoo_types import LoadBalancingConfig
    from distributed_shampoo.utils import load_balancing_utils
    from distributed_shampoo.utils.shampoo_utils import distribute_buffer_sizes

    from dash_shampoo.base import assign_owners

    generator = torch.Generator().manual_seed(0)
    for num_owners in (1, 2, 3, 5, 8):
        for dtype in (torch.float32, torch.bfloat16):
            sizes = torch.randint(1, 40, (60, 2), generator=generator).tolist()
            blocks = [torch.empty(size, dtype=dtype, device="meta") for size in sizes]
            if model == "memory":
                ours = embedded.AlignedMemoryCostModel()
                theirs = load_balancing_utils.AlignedMemoryCostModel()
            else:
                arguments = {"coefficients": (1.5, 0.3, 0.0, 0.1), "min_cost": 50.0}
                ours = embedded.PolynomialComputationalCostModel(**arguments)
                theirs = load_balancing_utils.PolynomialComputationalCostModel(**arguments)
            config = LoadBalancingConfig(cost_model=theirs)
            expected = distribute_buffer_sizes(tuple(blocks), num_owners, config)
            assert assign_owners(blocks, num_owners, ours) == [rank for _, rank in expected]


@pytest.mark.parametrize(
    ("module", "name"),
    [("dash_shampoo.base.embedded", "DistributedShampoo"), ("dash_shampoo", "DashShampoo")],
)
def test_what_cannot_be_distributed_is_refused(module, name, tmp_path):
    messages = run(2, workers.refusals, tmp_path, module, name)[0]
    expected = {
        "single device, DTensor": "SingleDeviceDistributedConfig needs plain tensors",
        "DDP, sharded": "tensor-parallel parameters are not supported",
        "fully shard, plain": "is a plain tensor, but FullyShardDistributedConfig needs",
        "fully shard, replicated": "needs parameters placed (Shard) by fully_shard",
        "fully shard, 2D": "tensor-parallel parameters are not supported",
        "hybrid, tensor parallel": "needs parameters placed (Replicate, Shard) by fully_shard",
        "hybrid, 1D mesh": "must have two dimensions",
        "trainers": "num_trainers_per_group=3: must be -1 or a divisor of the number of replicas, 2",
        "trainers, zero": "num_trainers_per_group=0: must be",
    }
    assert messages.keys() == expected.keys()
    for name, part in expected.items():
        assert part in (messages[name] or "nothing was raised"), name


def test_a_process_group_is_needed():
    with pytest.raises(RuntimeError, match=r"torch.distributed to be initialized"):
        embedded.DistributedShampoo(parameters(), distributed_config=DDP())
