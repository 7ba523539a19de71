"""Several processes: the examples of Meta's README, and checkpoints under DDP, against Meta's optimizer."""

from __future__ import annotations

import copy
import logging
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
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
    # Sharded over two processes, the last layer's weight is on the first one alone.
    return torch.nn.Sequential(
        torch.nn.Linear(12, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 5, bias=False),
        torch.nn.Linear(5, 1, bias=False),
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


def ddp_run(namespace, optimizer_class):
    network = torch.nn.parallel.DistributedDataParallel(model())
    config = namespace.DDPDistributedConfig(num_trainers_per_group=2)
    settings = adamw(namespace) | {
        "epsilon": 1e-6,
        "max_preconditioner_dim": 8,
        "precondition_frequency": 2,
        "distributed_config": config,
    }
    return network, optimizer_class(network.parameters(), **settings)


def train(network, optimizer, steps):
    for step in steps:
        for index, p in enumerate(network.parameters()):
            set_gradient(p, 100 * step + index)
        optimizer.step()


def through_a_file(source, target, folder):
    """From (model, optimizer) to (model, optimizer); returns the size of this process's file."""
    path = folder / f"rank_{dist.get_rank()}.pt"
    torch.save(source[1].state_dict(), path)
    target[1].load_state_dict(torch.load(path, weights_only=True))
    return path.stat().st_size


def through_dcp(source, target, folder):
    dcp.save({"optim": get_optimizer_state_dict(*source)}, checkpoint_id=folder)
    loaded = {"optim": get_optimizer_state_dict(*target)}
    dcp.load(loaded, checkpoint_id=folder)
    set_optimizer_state_dict(*target, loaded["optim"])
    return 0


def interchange(transfer, folder):
    """The relative errors after going over to DashShampoo and (on Meta's base) back, and file sizes."""
    straight = ddp_run(META, meta.DistributedShampoo)
    train(*straight, range(12))

    run = ddp_run(META, meta.DistributedShampoo)
    train(*run, range(4))
    sizes = []
    kinds = [(ds, ds.DashShampoo), (META, meta.DistributedShampoo)]
    if ds.base.name != "meta":  # no file gives Meta's optimizer its configs then
        kinds[1] = kinds[0]
    for kind, first in zip(kinds, (4, 8), strict=True):
        following = ddp_run(*kind)
        following[0].load_state_dict(run[0].state_dict())
        sizes.append(transfer(run, following, folder / str(first)))
        run = following
        train(*run, range(first, first + 4))
    errors = [
        float(torch.linalg.vector_norm(q - p) / torch.linalg.vector_norm(p))
        for p, q in zip(straight[0].parameters(), run[0].parameters(), strict=True)
    ]
    return errors, sizes


def message_of_a_nan():
    """What is said of a NaN in the weight of the second layer, whose first has one row."""
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    layers = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Linear(1, 8, bias=False))
    network = fully_shard(layers, mesh=mesh)
    optimizer = ds.DashShampoo(
        network.named_parameters(), distributed_config=ds.FullyShardDistributedConfig()
    )
    for p in network.parameters():
        set_gradient(p, 0)
    local(network[1].weight.grad).fill_(torch.nan)
    try:
        optimizer.step()
    except ds.PreconditionerValueError as error:
        return str(error)
    return "no error"


def everything(kinds, folder):
    tasks = {kind: (errors, kind) for kind in kinds}
    tasks["message"] = (message_of_a_nan,)
    for transfer in (through_a_file, through_dcp):
        for first in (4, 8):
            (folder / transfer.__name__ / str(first)).mkdir(parents=True, exist_ok=True)
        tasks[transfer.__name__] = (interchange, transfer, folder / transfer.__name__)
    results = {}
    for name, (function, *args) in tasks.items():
        try:
            results[name] = function(*args)
        except Exception:  # the others have a right to be tested
            results[name] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank, then by name; in one go, since starting processes takes longer than all the rest."""
    kinds = [kind for kind in KINDS if ds.base.name == "meta" or kind not in ONLY_META]
    folder = tmp_path_factory.mktemp("processes")
    return run_in_processes(everything, NUM_PROCESSES, folder, kinds, folder)


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


@pytest.mark.distributed
def test_a_parameter_is_named_where_others_have_no_local_shard(results):
    for result in results:
        assert "of 1.weight has nan or inf entries" in result["message"]


@pytest.mark.distributed
@pytest.mark.parametrize("transfer", ["through_a_file", "through_dcp"])
def test_checkpoints_interchange_under_ddp(transfer, results):
    for result in results:
        assert isinstance(result[transfer], tuple), result[transfer]
        errors, (of_meta, of_dash) = result[transfer]
        assert len(errors) == 4
        assert max(errors) <= TOLERANCE
        # A view that dragged its whole stack along would show here.
        assert of_dash <= 1.05 * of_meta
