"""Plans against real optimizers in real process groups: two ranks, gloo."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

import dash_shampoo as ds
from dash_shampoo.planning import Parallelism, plan_optimizer
from tests.state_bytes import real_bytes

WORLD_SIZE = 2
SHAPES = [(40, 24), (24, 40), (24,), (33, 7), (7,), (3, 100)]
OPTIONS = {
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "max_preconditioner_dim": 16,
    "grafting_config": ds.AdamPreconditionerConfig(),
}
CONFIGS = {"ddp": ds.DDPDistributedConfig, "fully_shard": ds.FullyShardDistributedConfig}


class Weights(nn.Module):
    """Parameters of all shapes."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in SHAPES])


def build(strategy):
    model = Weights()
    if strategy == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    return ds.DashShampoo(model.parameters(), distributed_config=CONFIGS[strategy](), **OPTIONS)


def measure(rank, port, folder):
    """In a process of its own: the state of each strategy, or why there is none."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    for strategy in CONFIGS:
        try:
            optimizer = build(strategy)
        except NotImplementedError as error:
            result = str(error)
        else:
            lists = optimizer._per_group_state_lists[0]
            blocks = [tuple(b.shape) for b in lists["distributor"].local_blocked_params]
            stacks = lists["shampoo_preconditioner_list"].plan.stacks
            counts = [(s.size, s.root, len(s.slots)) for s in stacks]
            result = (real_bytes(optimizer), blocks, counts)
        torch.save(result, f"{folder}/{strategy}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(measure, args=(port, str(folder)), nprocs=WORLD_SIZE)
    return {
        strategy: [torch.load(folder / f"{strategy}_{rank}.pt") for rank in range(WORLD_SIZE)]
        for strategy in CONFIGS
    }


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", CONFIGS)
def test_ranks_own_what_the_plan_says(measured, strategy):
    if isinstance(measured[strategy][0], str):
        pytest.skip(measured[strategy][0])
    params = [torch.empty(shape, device="meta") for shape in SHAPES]
    parallelism = Parallelism(strategy=strategy, world_size=WORLD_SIZE)
    plan = plan_optimizer(params, parallelism, distributed_config=CONFIGS[strategy](), **OPTIONS)
    for rank, (state_bytes, blocks, stacks) in zip(plan.ranks, measured[strategy], strict=True):
        assert rank.num_blocks == len(blocks)
        assert rank.state_bytes == state_bytes
        assert [(s.size, s.root, s.num_matrices) for s in rank.stacks] == stacks
