"""What the processes of the distributed tests do. Everything here runs in every process."""

from __future__ import annotations

import copy
import importlib
import logging

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dash_shampoo.base.embedded as embedded
from dash_shampoo.base.embedded.dtensors import local_tensor
from tests.base.cases import config_class, flatten, gradients, parameters, take_steps

logging.getLogger("dash_shampoo").setLevel(logging.ERROR)

AVERAGING = {
    None: None,
    "nesterov": embedded.ClassicMomentumConfig(momentum=0.9, use_nesterov=True),
    "schedule_free": embedded.ScheduleFreeConfig(),
}


def options(**changes):
    """The constructor's arguments; the same in one process and in several."""
    return {
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "epsilon": 1e-6,
        "weight_decay": 0.01,
        "max_preconditioner_dim": 8,
        "precondition_frequency": 2,
        "grafting_config": embedded.AdamPreconditionerConfig(),
        **changes,
    }


def plain_state(optimizer):
    """Local tensors of the state by path."""
    state = flatten(optimizer.state_dict()["state"])
    with torch.no_grad():
        return {key: local_tensor(value).clone() for key, value in state}


def replicated(rank, shapes, steps, config, changes, drop=None):
    """Steps with replicated parameters; returns them after each step, and the state at both ends.

    Args:
        drop: Parameter whose gradient is missing on rank 1 in every step.
    """
    params = parameters(torch.float32, shapes)
    optimizer = embedded.DistributedShampoo(params, distributed_config=config, **options(**changes))
    before = plain_state(optimizer)
    trajectory = []
    for grads in steps:
        grads = list(grads)
        if drop is not None and rank == 1:
            grads[drop] = None
        take_steps(optimizer, params, [grads])
        trajectory.append([p.detach().clone() for p in params])
    if changes.get("iterate_averaging_config") is not None:
        for mode in ("eval", "train"):
            if isinstance(changes["iterate_averaging_config"], embedded.ScheduleFreeConfig):
                getattr(optimizer, mode)()
                trajectory.append([p.detach().clone() for p in params])
    return {
        "trajectory": trajectory,
        "before": before,
        "after": plain_state(optimizer),
        "ids": list(optimizer.state_dict()["state"]),
        "num_blocks": len(optimizer._per_group_state_lists[0]["distributor"].local_blocked_params),
    }


def resumed(rank, shapes, steps, config, path, world_size_changes):
    """Half of the steps, a checkpoint by torch.distributed.checkpoint, the other half."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    class Model(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            self.all = torch.nn.ParameterList(params)

    def build():
        model = Model(parameters(torch.float32, shapes))
        return model, embedded.DistributedShampoo(
            model.parameters(), distributed_config=config, **options()
        )

    half = len(steps) // 2
    model, optimizer = build()
    if world_size_changes != "load":
        take_steps(optimizer, list(model.parameters()), steps[:half])
        state = get_optimizer_state_dict(model, optimizer)["state"]
        dcp.save({"model": model.state_dict(), "state": state}, checkpoint_id=path)
        if world_size_changes == "save":
            return None
    model, optimizer = build()
    whole = get_optimizer_state_dict(model, optimizer)
    loaded = {"model": model.state_dict(), "state": whole["state"]}
    dcp.load(loaded, checkpoint_id=path)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, {**whole, "state": loaded["state"]})
    take_steps(optimizer, list(model.parameters()), steps[half:])
    return [p.detach().clone() for p in model.parameters()]


def against_meta(rank, shapes, steps, kind, arguments):
    """The same steps with Meta's distributed optimizer; its checkpoint is loaded into ours."""
    import distributed_shampoo

    logging.disable(logging.WARNING)
    results = []
    optimizers = []
    for base in (embedded, distributed_shampoo):
        params = parameters(torch.float32, shapes)
        config = config_class(base, kind)(**arguments)
        grafting = config_class(base, "AdamPreconditionerConfig")()
        optimizer = base.DistributedShampoo(
            params, distributed_config=config, **options(grafting_config=grafting)
        )
        take_steps(optimizer, params, steps)
        results.append([p.detach().clone() for p in params])
        optimizers.append(optimizer)
    states = [plain_state(optimizer) for optimizer in optimizers]
    saved = copy.deepcopy(optimizers[1].state_dict())
    dtensors = [
        {key for key, value in flatten(o.state_dict()["state"]) if isinstance(value, DTensor)}
        for o in optimizers
    ]
    optimizers[0].load_state_dict(saved)
    return {
        "params": results,
        "states": states,
        "loaded": plain_state(optimizers[0]),
        "dtensors": dtensors,
    }


class Net(torch.nn.Module):
    """Layers whose sizes are divisible by nothing, of which the last is sometimes unused."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 9)
        self.second = torch.nn.Linear(9, 3)
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, x, use_all=False):
        x = self.second(torch.tanh(self.first(x))) * self.scale.sum()
        return self.unused(x) if use_all else x


def inputs(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 5, generator=generator)


def trained_model(rank, wrapper):
    """A model trained on different data by rank, wrapped by DDP or `replicate`."""
    net = Net()
    if wrapper == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    else:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        model = replicate(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        assert all(isinstance(p, DTensor) for p in net.parameters())
    optimizer = embedded.DistributedShampoo(
        net.parameters(), distributed_config=embedded.DDPDistributedConfig(), **options()
    )
    trajectory = []
    for step in range(4):
        optimizer.zero_grad()
        model(inputs(step, rank), use_all=step % 2 == 1).square().mean().backward()
        grads = [None if p.grad is None else local_tensor(p.grad).clone() for p in net.parameters()]
        optimizer.step()
        params = [local_tensor(p.detach()).clone() for p in net.parameters()]
        trajectory.append((grads, params))
    return trajectory


def sharded(rank, mesh_shape, num_steps, changes, hybrid_options=None):
    """A fully sharded model; gradients and parameters of the local shards, step by step."""
    net = Net()
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = fully_shard(net, mesh=mesh)
    config = embedded.FullyShardDistributedConfig()
    if len(mesh_shape) == 2:
        config = embedded.HybridShardDistributedConfig(device_mesh=mesh, **(hybrid_options or {}))
    optimizer = embedded.DistributedShampoo(
        net.parameters(), distributed_config=config, **options(**changes)
    )
    first = [p.to_local().detach().clone() for p in net.parameters()]
    keys = [list(state) for state in optimizer.state_dict()["state"].values()]
    trajectory = []
    for step in range(num_steps):
        optimizer.zero_grad()
        model(inputs(step, 0), use_all=step % 2 == 1).square().mean().backward()
        grads = [None if p.grad is None else p.grad.to_local().clone() for p in net.parameters()]
        optimizer.step()
        trajectory.append((grads, [p.to_local().detach().clone() for p in net.parameters()]))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    return {"first": first, "trajectory": trajectory, "keys": keys, "state": plain_state(optimizer)}


def sharded_against_meta(rank, mesh_shape, shapes, steps):
    """As `against_meta`, with DTensors as `fully_shard` makes them."""
    import distributed_shampoo

    logging.disable(logging.WARNING)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    placements = [Replicate(), Shard(0)][-len(mesh_shape) :]
    # The first shape is (), and a scalar cannot be sharded.
    assert shapes[0] == ()

    def shard(tensor):
        return None if tensor is None else distribute_tensor(tensor.detach(), mesh, placements)

    results, optimizers = [], []
    for base in (embedded, distributed_shampoo):
        params = [torch.nn.Parameter(shard(p)) for p in parameters(torch.float32, shapes)[1:]]
        if len(mesh_shape) == 2:
            config = config_class(base, "HybridShardDistributedConfig")(device_mesh=mesh)
        else:
            config = config_class(base, "FullyShardDistributedConfig")()
        grafting = config_class(base, "AdamPreconditionerConfig")()
        optimizer = base.DistributedShampoo(
            params, distributed_config=config, **options(grafting_config=grafting)
        )
        for grads in steps:
            for param, grad in zip(params, grads[1:], strict=True):
                param.grad = shard(grad)
            optimizer.step()
        results.append([p.to_local().detach().clone() for p in params])
        optimizers.append(optimizer)
    states = [plain_state(optimizer) for optimizer in optimizers]
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    return {"params": results, "states": states, "loaded": plain_state(optimizers[0])}


def refusals(rank, module, name):
    """Messages of what cannot be done with a class of a module; None where nothing was raised."""
    e = importlib.import_module(module)
    optimizer_class = getattr(e, name)
    flat = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    column = distribute_tensor(torch.ones(4, 4), flat, [Shard(0)])
    whole = distribute_tensor(torch.ones(4, 4), flat, [Replicate()])
    both = distribute_tensor(torch.ones(4, 4), square, [Shard(0), Shard(1)])
    plain = torch.ones(4, 4)
    cases = {
        "single device, DTensor": (column, e.SingleDeviceDistributedConfig()),
        "DDP, sharded": (column, e.DDPDistributedConfig()),
        "fully shard, plain": (plain, e.FullyShardDistributedConfig()),
        "fully shard, replicated": (whole, e.FullyShardDistributedConfig()),
        "fully shard, 2D": (both, e.FullyShardDistributedConfig()),
        "hybrid, tensor parallel": (both, e.HybridShardDistributedConfig(device_mesh=square)),
        "hybrid, 1D mesh": (column, e.HybridShardDistributedConfig(device_mesh=flat)),
        "trainers": (plain, e.DDPDistributedConfig(num_trainers_per_group=3)),
        "trainers, zero": (plain, e.DDPDistributedConfig(num_trainers_per_group=0)),
    }
    messages = {}
    for name, (tensor, config) in cases.items():
        messages[name] = None
        try:
            optimizer_class([torch.nn.Parameter(tensor)], distributed_config=config)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def world(rank):
    return rank, dist.get_world_size(), gradients(1)[0][1].shape
