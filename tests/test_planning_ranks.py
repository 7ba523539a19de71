"""Plans against real optimizers in real process groups: two ranks, gloo."""

import importlib
import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import dash_shampoo as ds
from dash_shampoo.base import name as base_name
from dash_shampoo.planning import Parallelism, plan_optimizer
from tests.processes import CONTEXT, free_port
from tests.state_bytes import real_bytes

WORLD_SIZE = 2
SHAPES = [(40, 24), (24, 40), (24,), (33, 7), (7,), (3, 100)]
OPTIONS = {
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "max_preconditioner_dim": 16,
    "grafting_config": ds.AdamPreconditionerConfig(),
}
CONFIGS = {
    "ddp": ds.DDPDistributedConfig,
    "fully_shard": ds.FullyShardDistributedConfig,
    "hybrid_shard": ds.HybridShardDistributedConfig,
}
TWO_RANKS = ("ddp", "fully_shard")


class Weights(nn.Module):
    """Parameters of all shapes."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in SHAPES])


def build(strategy, world_size=WORLD_SIZE, replicas=1, group_size=-1):
    model = Weights()
    options = {"num_trainers_per_group": group_size} if strategy != "fully_shard" else {}
    if strategy != "ddp":
        names = ("replicate", "shard")
        mesh = init_device_mesh("cpu", (replicas, world_size // replicas), mesh_dim_names=names)
        if strategy == "hybrid_shard":
            options["device_mesh"] = mesh
        fully_shard(model, mesh=mesh if strategy == "hybrid_shard" else mesh["shard"])
    config = CONFIGS[strategy](**options)
    return ds.DashShampoo(model.parameters(), distributed_config=config, **OPTIONS), config


def buffer_bytes(optimizer):
    """Of the buffer that updates are gathered in; each base has its own name for it."""
    distributor = optimizer._per_group_state_lists[0]["distributor"]
    for name in ("_global_buffer", "_global_dist_buffer"):
        if hasattr(distributor, name):
            return getattr(distributor, name).nbytes
    return 0


def measure(rank, port, folder):
    """In a process of its own: what each strategy builds."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    for strategy in TWO_RANKS:
        optimizer, _ = build(strategy)
        lists = optimizer._per_group_state_lists[0]
        num_blocks = len(lists["distributor"].local_blocked_params)
        stacks = lists["shampoo_preconditioner_list"].layout.stacks
        counts = [(s.size, s.root, len(s.slots)) for s in stacks]
        result = (real_bytes(optimizer), num_blocks, counts, buffer_bytes(optimizer))
        torch.save(result, f"{folder}/{strategy}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(
        measure,
        (free_port(), str(folder)),
        nprocs=WORLD_SIZE,
        start_method=CONTEXT.get_start_method(),
    )
    return {
        strategy: [torch.load(folder / f"{strategy}_{rank}.pt") for rank in range(WORLD_SIZE)]
        for strategy in TWO_RANKS
    }


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", TWO_RANKS)
def test_ranks_own_what_the_plan_says(measured, strategy):
    params = [torch.empty(shape, device="meta") for shape in SHAPES]
    parallelism = Parallelism(strategy=strategy, world_size=WORLD_SIZE)
    plan = plan_optimizer(params, parallelism, distributed_config=CONFIGS[strategy](), **OPTIONS)
    for rank, (state_bytes, num_blocks, stacks, gathered) in zip(
        plan.ranks, measured[strategy], strict=True
    ):
        assert rank.num_blocks == num_blocks
        assert rank.state_bytes == state_bytes
        assert rank.buffer_bytes == gathered
        assert [(s.size, s.root, s.num_matrices) for s in rank.stacks] == stacks


# More ranks than two: one process takes the part of each in turn, in a group without a transport.
MANY = [("ddp", 5, 1, -1), ("ddp", 8, 1, 4), ("fully_shard", 50, 1, -1), ("hybrid_shard", 6, 2, -1)]


def forget_meshes():
    """Meta's package keeps the meshes of past process groups."""
    if base_name == "meta":
        module = importlib.import_module("distributed_shampoo.distributor.shampoo_dist_utils")
        module.get_device_mesh.cache_clear()


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "world_size", "replicas", "group_size"), MANY)
def test_many_ranks_own_what_the_plan_says(strategy, world_size, replicas, group_size):
    params = [torch.empty(shape, device="meta") for shape in SHAPES]
    parallelism = Parallelism(strategy=strategy, world_size=world_size, replicate_degree=replicas)
    for rank in sorted({0, 1, world_size // 2, world_size - 1}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            optimizer, config = build(strategy, world_size, replicas, group_size)
            plan = plan_optimizer(params, parallelism, distributed_config=config, **OPTIONS)
            assert plan.ranks[rank].state_bytes == real_bytes(optimizer)
            assert plan.ranks[rank].buffer_bytes == buffer_bytes(optimizer)
        finally:
            dist.destroy_process_group()
            forget_meshes()
