"""What the processes of test_consolidation do: rank 0 saves, all load."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import dash_shampoo as ds
from tests.distributed.replica_workers import message

logging.getLogger("dash_shampoo").setLevel(logging.ERROR)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(9, 12)
        self.second = torch.nn.Linear(12, 6, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def build(kind, config=None):
    torch.manual_seed(0)
    model = Model()
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        config = ds.FullyShardDistributedConfig()
    elif kind == "hybrid_shard":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
        fully_shard(model, mesh=mesh)
        config = ds.HybridShardDistributedConfig(device_mesh=mesh)
    elif kind == "ddp":
        config = ds.DDPDistributedConfig()
    optimizer = ds.DashShampoo(
        model.named_parameters(),
        lr=0.05,
        betas=(0.9, 0.95),
        epsilon=1e-6,
        max_preconditioner_dim=4,
        precondition_frequency=2,
        grafting_config=ds.AdamPreconditionerConfig(),
        iterate_averaging_config=ds.ClassicMomentumConfig(momentum=0.9),
        distributed_config=config or ds.SingleDeviceDistributedConfig(),
    )
    return model, optimizer


def train(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 9, generator=generator)).square().sum().backward()
        optimizer.step()
    return [local(p).clone() for p in model.parameters()]


def local(tensor):
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def leaves(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def saved_by_one(rank, kind, path, to):
    model, optimizer = build(kind)
    train(model, optimizer, 0, 3)
    optimizer.consolidate_state_dict(to)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = optimizer.state_dict()
    kinds = {type(value).__name__ for value in leaves(state["state"])}
    if rank == to:
        torch.save(state, path)
    dist.barrier()
    expected = train(model, optimizer, 3, 6)

    model, optimizer = build(kind)
    model.load_state_dict(weights)
    optimizer.load_state_dict(torch.load(path, weights_only=True))
    found = train(model, optimizer, 3, 6)
    return {"found": found, "expected": expected, "kinds": kinds}


def outdated(rank):
    """A step after the consolidation: what follows is partial again."""
    model, optimizer = build("ddp")
    train(model, optimizer, 0, 1)
    optimizer.consolidate_state_dict()
    train(model, optimizer, 1, 2)
    keys = [set(tree) for tree in optimizer.state_dict()["state"].values()]
    optimizer.consolidate_state_dict()
    return {"partial": keys, "whole": [set(t) for t in optimizer.state_dict()["state"].values()]}


def partial(rank, kind, path):
    """Rank 0 saves its own state alone; the others are told what happened."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("dash_shampoo")
    logger.setLevel(logging.WARNING)
    model, optimizer = build(kind)
    train(model, optimizer, 0, 3)
    logger.addHandler(handler)
    for _ in range(2):
        state = optimizer.state_dict()
    logger.removeHandler(handler)
    if rank == 0:
        torch.save(state, path)
    dist.barrier()
    before = [value.clone() for value in map(local, leaves(optimizer.state_dict()["state"]))]
    said = message(optimizer.load_state_dict, torch.load(path, weights_only=False))
    after = map(local, leaves(optimizer.state_dict()["state"]))
    unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"said": said, "records": records, "unchanged": unchanged}


class Sharded(torch.nn.Module):
    """Rows that are multiples of the block size on one, two and four ranks, but for `odd`."""

    def __init__(self, with_odd):
        super().__init__()
        self.first = torch.nn.Linear(6, 16)
        self.second = torch.nn.Linear(16, 32, bias=False)
        self.odd = torch.nn.Linear(16, 12, bias=False) if with_odd else None


def build_sharded(shape, with_odd):
    """Under `fully_shard` on a mesh of this shape, with replicas where it has two dimensions; plain on ()."""
    torch.manual_seed(0)
    model = Sharded(with_odd)
    config = ds.SingleDeviceDistributedConfig()
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("r", "s")[-len(shape) :])
        fully_shard(model, mesh=mesh)
        config = ds.FullyShardDistributedConfig()
        if len(shape) == 2:
            config = ds.HybridShardDistributedConfig(device_mesh=mesh)
    optimizer = ds.DashShampoo(
        model.named_parameters(),
        lr=0.05,
        betas=(0.9, 0.95),
        epsilon=1e-3,
        max_preconditioner_dim=4,
        precondition_frequency=2,
        grafting_config=ds.AdamPreconditionerConfig(),
        distributed_config=config,
    )
    return model, optimizer


def train_sharded(model, optimizer, first, last):
    """The same gradients, whoever holds which rows; returns the whole parameters."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = placed_as(p, torch.randn(p.shape, generator=generator))
        optimizer.step()
    return whole(model)


def placed_as(param, tensor):
    if not hasattr(param, "placements"):
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements)


@torch.no_grad()
def set_weights(model, weights):
    for name, p in model.named_parameters():
        p.copy_(placed_as(p, weights[name]))


def whole(model):
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for key, value in weights.items()
    }


def saved_in_shards(rank, path, shape, with_odd):
    """Three steps, the whole state saved by rank 0, three more."""
    model, optimizer = build_sharded(shape, with_odd)
    weights = train_sharded(model, optimizer, 0, 3)
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict()
    if rank == 0:
        torch.save({"model": weights, "optimizer": state}, path)
    return train_sharded(model, optimizer, 3, 6)


def loaded_in_shards(rank, path, shape, with_odd):
    """What was said to the state of another number of ranks, and three steps more."""
    del rank
    model, optimizer = build_sharded(shape, with_odd)
    saved = torch.load(path, weights_only=True)
    train_sharded(model, optimizer, 6, 7)  # some other state, which a refusal must leave alone
    before = [value.clone() for value in map(local, leaves(optimizer.state_dict()["state"]))]
    said = message(optimizer.load_state_dict, saved["optimizer"])
    after = map(local, leaves(optimizer.state_dict()["state"]))
    unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    set_weights(model, saved["model"])
    return {
        "said": said,
        "unchanged": unchanged,
        "params": train_sharded(model, optimizer, 3, 6),
    }
