"""The examples of Meta's README that need several processes, against Meta's optimizer."""

from __future__ import annotations

import copy
import logging
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor

import dash_shampoo as ds
from tests.meta.processes import run_in_processes
from tests.meta.readme_examples import adamw

meta = pytest.importorskip("distributed_shampoo", reason="Meta's package is not importable")
META = SimpleNamespace(**{name: getattr(meta, name) for name in meta.__all__})

TOLERANCE = 1e-4  # as for the examples on one device
NUM_PROCESSES = 2


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 6, bias=False)
    )


def ddp(network):
    wrapped = torch.nn.parallel.DistributedDataParallel(network)
    return wrapped, lambda ns: ns.DDPDistributedConfig(
        communication_dtype=torch.float32, num_trainers_per_group=2, communicate_params=False
    )


def fsdp1(network):
    wrapped = FullyShardedDataParallel(network, use_orig_params=True, device_id=torch.device("cpu"))
    return wrapped, lambda ns: ns.FSDPDistributedConfig(
        param_to_metadata=ns.compile_fsdp_parameter_metadata(wrapped)
    )


def hsdp1(network):
    # One replica: with one shard, FSDP does not flatten, and Meta's package refuses.
    mesh = init_device_mesh("cpu", (NUM_PROCESSES // 2, 2))
    wrapped = FullyShardedDataParallel(
        network,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    return wrapped, lambda ns: ns.HSDPDistributedConfig(
        param_to_metadata=ns.compile_fsdp_parameter_metadata(wrapped), device_mesh=mesh
    )


def fsdp2(network):
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    return fully_shard(network, mesh=mesh), lambda ns: ns.FullyShardDistributedConfig()


def hsdp2(network):
    mesh = init_device_mesh("cpu", (2, NUM_PROCESSES // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(network, mesh=mesh), lambda ns: ns.HybridShardDistributedConfig(
        device_mesh=mesh
    )


KINDS = {f.__name__: f for f in (ddp, fsdp1, hsdp1, fsdp2, hsdp2)}
ONLY_META = {"fsdp1", "hsdp1"}


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def set_gradient(p, seed):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(local(p).shape, generator=generator)
    if isinstance(p, DTensor):
        grad = DTensor.from_local(
            grad, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
    p.grad = grad


def errors(kind):
    """The relative error of every local parameter after some steps."""
    logging.disable(logging.WARNING)
    runs = []
    for namespace, optimizer_class in ((META, meta.DistributedShampoo), (ds, ds.DashShampoo)):
        network, distributed_config = KINDS[kind](copy.deepcopy(model()))
        settings = adamw(namespace) | {
            "max_preconditioner_dim": 8,
            "precondition_frequency": 10,
            "start_preconditioning_step": 20,
            "distributed_config": distributed_config(namespace),
        }
        params = list(network.parameters())
        optimizer = optimizer_class(params, **settings)
        for step in range(24):
            for index, p in enumerate(params):
                set_gradient(p, 100 * step + index)
            optimizer.step()
        runs.append([local(p).detach().clone() for p in params])
    return [
        float(torch.linalg.vector_norm(q - p) / torch.linalg.vector_norm(p))
        for p, q in zip(*runs, strict=True)
        if p.numel() > 0
    ]


def errors_of(kinds):
    results = {}
    for kind in kinds:
        try:
            results[kind] = errors(kind)
        except Exception:  # the other kinds have a right to be tested
            results[kind] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank, then by kind; in one go, since starting processes takes longer than all the rest."""
    kinds = [kind for kind in KINDS if ds.base.name == "meta" or kind not in ONLY_META]
    return run_in_processes(errors_of, NUM_PROCESSES, tmp_path_factory.mktemp("examples"), kinds)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_example(kind, results):
    if kind not in results[0]:
        pytest.skip("the embedded base leaves FSDP1 out")
    for result in results:
        assert isinstance(result[kind], list), result[kind]
    found = [error for result in results for error in result[kind]]
    assert len(found) >= 3
    assert max(found) <= TOLERANCE
