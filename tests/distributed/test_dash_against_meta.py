"""DashShampoo on Meta's base, under each distributed config of Meta's package that two ranks can run."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor

import dash_shampoo as ds
from tests.base.cases import gradients, meta, relative_error
from tests.distributed.dash_workers import NUM_STEPS, everything, local, settings
from tests.distributed.processes import run

pytestmark = pytest.mark.distributed

ROUND_OFF = 1e-5


def model():
    torch.manual_seed(0)
    # Sharded over two ranks, the last layer's weight is on the first one alone.
    return torch.nn.Sequential(
        torch.nn.Linear(12, 16), torch.nn.Linear(16, 5, bias=False), torch.nn.Linear(5, 1)
    )


def all_to_all_by_gathering(received, sent, group=None):
    """Stands in for the collective that gloo lacks: everybody sees all, and takes what is meant for it."""
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [tensor.clone() for tensor in sent], group=group)
    for mine, lists in zip(received, everyone, strict=True):
        mine.copy_(lists[dist.get_rank(group)])


def ddp(network):
    return network, ds.DDPDistributedConfig()


def fsdp1(network):
    wrapped = FullyShardedDataParallel(network, use_orig_params=True, device_id=torch.device("cpu"))
    metadata = ds.compile_fsdp_parameter_metadata(wrapped)
    return wrapped, ds.FSDPDistributedConfig(param_to_metadata=metadata)


def hsdp1(network):
    # One replica: with one shard, FSDP does not flatten, and Meta's package refuses.
    mesh = init_device_mesh("cpu", (1, 2))
    wrapped = FullyShardedDataParallel(
        network,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    metadata = ds.compile_fsdp_parameter_metadata(wrapped)
    return wrapped, ds.HSDPDistributedConfig(param_to_metadata=metadata, device_mesh=mesh)


def fsdp2(network, strategy):
    mesh = init_device_mesh("cpu", (2,))
    config = ds.FullyShardDistributedConfig(
        param_assignment_strategy=ds.FSDPParamAssignmentStrategy[strategy]
    )
    return fully_shard(network, mesh=mesh), config


def hsdp2(network, strategy, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    config = ds.HybridShardDistributedConfig(
        device_mesh=mesh, param_assignment_strategy=ds.FSDPParamAssignmentStrategy[strategy]
    )
    return fully_shard(network, mesh=mesh), config


def compare(distribute, *args):
    """The relative errors of all local parameters, step by step, and how many blocks this rank has."""
    logging.disable(logging.WARNING)
    # In this process alone, which ends after the cases.
    dist.all_to_all = all_to_all_by_gathering
    runs = []
    for optimizer_class in (ds.DistributedShampoo, ds.DashShampoo):
        network, config = distribute(model(), *args)
        params = list(network.parameters())
        optimizer = optimizer_class(params, distributed_config=config, **settings("eigen"))
        shapes = [local(p).shape for p in params]
        trajectory = [[local(p).detach().clone() for p in params]]
        for grads in gradients(NUM_STEPS, dtype=torch.float32, shapes=shapes):
            for p, grad in zip(params, grads, strict=True):
                if isinstance(p, DTensor):
                    grad = DTensor.from_local(
                        grad, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
                    )
                p.grad = grad
            optimizer.step()
            trajectory.append([local(p).detach().clone() for p in params])
        runs.append(trajectory)
    assert isinstance(optimizer, ds.DashShampoo)
    assert any(c.__module__.startswith("distributed_shampoo") for c in type(optimizer).__mro__)
    return {
        "errors": [
            relative_error(p, q)
            for ours, theirs in zip(*runs, strict=True)
            for p, q in zip(ours, theirs, strict=True)
        ],
        "moved": any(not torch.equal(p, q) for p, q in zip(runs[1][0], runs[1][-1], strict=True)),
    }


CASES = {
    "ddp": (compare, ddp, {}),
    "fsdp1": (compare, fsdp1, {}),
    "hsdp1": (compare, hsdp1, {}),
    **{
        f"fsdp2, {strategy}": (compare, fsdp2, strategy, {})
        for strategy in ("DEFAULT", "REPLICATE", "ROUND_ROBIN")
    },
    **{
        f"hsdp2, {strategy}, {mesh_shape}": (compare, hsdp2, strategy, mesh_shape, {})
        for mesh_shape in ((2, 1), (1, 2))
        for strategy in ("DEFAULT", "REPLICATE", "ROUND_ROBIN")
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank, then by case."""
    meta()
    if ds.base.name != "meta":
        pytest.skip("DashShampoo runs on the embedded base here")
    return run(2, everything, tmp_path_factory.mktemp("meta"), CASES)


@pytest.mark.parametrize("name", CASES)
def test_each_distributed_config_equals_metas(name, results):
    """ROUND_ROBIN with a stand-in for all-to-all, so what is tested there is not the communication."""
    for result in results:
        assert isinstance(result[name], dict), result[name]
        assert max(result[name]["errors"]) <= ROUND_OFF
    assert any(result[name]["moved"] for result in results)
