"""What the processes of test_replicas do: subgroups, wrong groups, errors of one process, averaging."""

from __future__ import annotations

import contextlib
import gc
import logging
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import dash_shampoo as ds
from dash_shampoo.base import Flight

logging.getLogger("dash_shampoo").setLevel(logging.ERROR)
SHAPES = [(9, 5), (7,), (6, 6), (4, 9)]


def build(classes, seed, config, shapes=SHAPES, **changes):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    options = {
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "epsilon": 1e-6,
        "max_preconditioner_dim": 4,
        "grafting_config": ds.AdamPreconditionerConfig(),
        **changes,
    }
    return params, classes(params, distributed_config=config, **options)


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def run(params, optimizer, seed, num_steps=4):
    for step in range(num_steps):
        set_gradients(params, 100 * seed + step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def alone(seed, **changes):
    config = ds.SingleDeviceDistributedConfig()
    return run(*build(ds.DashShampoo, seed, config, **changes), seed)


def message(function, *args, **kwargs):
    """Type and text of what is raised, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def stages(rank, given):
    """Two stages of a pipeline with equal shapes and two replicas each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    replicas = mesh["dp"] if given == "mesh" else mesh.get_group("dp")
    stage = mesh.get_local_rank("pp")
    num_before = len(dist.distributed_c10d._world.pg_map)
    found = []
    for size in (-1, 2, 1):
        config = ds.DashDDPDistributedConfig(replicas=replicas, num_trainers_per_group=size)
        params, optimizer = build(ds.DashShampoo, stage, config)
        found.append(run(params, optimizer, stage))
    num_made = len(dist.distributed_c10d._world.pg_map) - num_before
    return {"found": found, "expected": alone(stage), "num_made": num_made}


def groups(rank, size):
    """Process groups that 6 parameter groups need, and the warning about values that differ."""
    config = ds.DDPDistributedConfig(num_trainers_per_group=size)
    before = len(dist.distributed_c10d._world.pg_map)
    params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(6)]
    # Kept: the groups of an optimizer that is gone need not be there for the next.
    kept = ds.DashShampoo([{"params": [p]} for p in params], distributed_config=config)
    made = len(dist.distributed_c10d._world.pg_map) - before
    del kept
    gc.collect()
    return made


def others(rank, kind):
    """Ranks that are no replicas: other shapes, other numbers of parameters, other values."""
    shapes = SHAPES
    if rank == 1 and kind == "shapes":
        shapes = [(9, 5), (7,), (6, 5), (4, 9)]
    if rank == 1 and kind == "numbers":
        shapes = SHAPES[:2]
    if kind != "values":
        config = ds.DDPDistributedConfig()
        return message(build, ds.DashShampoo, 0, config, shapes)
    params, optimizer = build(ds.DashShampoo, rank, ds.DDPDistributedConfig())
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("dash_shampoo")
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    run(params, optimizer, 0)
    logger.removeHandler(handler)
    return records


def failing(rank, where, communicate_params):
    """An error on the owner of a block alone; afterwards the other blocks are trained on."""
    config = ds.DDPDistributedConfig(communicate_params=communicate_params)
    params, optimizer = build(ds.DashShampoo, 0, config, precondition_frequency=2)
    run(params, optimizer, 0, num_steps=1)
    with contextlib.ExitStack() as stack:
        if rank == 1:

            def fail(*args, **kwargs):
                raise ZeroDivisionError("the owner's own error")

            setattr(optimizer, where, fail)
            stack.callback(delattr, optimizer, where)
        set_gradients(params, 1)
        said = message(optimizer.step)
    # Nobody waits for anybody, and nobody fails again.
    after = run(params, optimizer, 2)
    return {"said": said, "after": after}


def in_groups(communicate_params=False):
    """An optimizer with a group for each parameter."""
    config = ds.DDPDistributedConfig(communicate_params=communicate_params)
    params, _ = build(ds.DashShampoo, 0, config)
    groups = [{"params": [param]} for param in params]
    settings = {
        "lr": 0.1,
        "epsilon": 1e-6,
        "max_preconditioner_dim": 4,
        "precondition_frequency": 2,
    }
    return params, ds.DashShampoo(groups, distributed_config=config, **settings)


def overlapping(rank, communicate_params):
    """The order of what happens in a step, and parameters with and without overlap."""
    params, optimizer = in_groups(communicate_params)
    found = {"overlapped": run(params, optimizer, 0)}
    lists = optimizer._per_group_state_lists
    numbers = {id(state_lists["distributor"]): n for n, state_lists in enumerate(lists)}
    events = []

    def note(cls, name, what):
        original = getattr(cls, name)

        def noted(self, *args, **kwargs):
            distributor = kwargs["state_lists"]["distributor"] if what == "compute" else self
            events.append((what, numbers[id(distributor)]))
            return original(self, *args, **kwargs)

        return mock.patch.object(cls, name, noted)

    distributors = type(lists[0]["distributor"])
    with (
        note(ds.DashShampoo, "_compute_search_directions", "compute"),
        note(distributors, "_gather", "send"),
        note(distributors, "_land", "arrive"),
    ):
        run(params, optimizer, 1, num_steps=1)
    params, optimizer = in_groups(communicate_params)
    with mock.patch.object(Flight, "over_group", return_value=contextlib.nullcontext()):
        found["one by one"] = run(params, optimizer, 0)
    return {**found, "events": events}


def failing_in_a_group(rank, number):
    """An error of rank 1 in one of four groups; afterwards all are trained on."""
    params, optimizer = in_groups()
    run(params, optimizer, 0, num_steps=1)
    with contextlib.ExitStack() as stack:
        if rank == 1:
            compute = optimizer._precondition_and_grafting
            state_lists = optimizer._per_group_state_lists[number]

            def fail(lists, *args):
                if lists["distributor"] is state_lists["distributor"]:
                    raise ZeroDivisionError("the owner's own error")
                return compute(lists, *args)

            optimizer._precondition_and_grafting = fail
            stack.callback(delattr, optimizer, "_precondition_and_grafting")
        set_gradients(params, 1)
        before = [p.detach().clone() for p in params]
        said = message(optimizer.step)
    moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    return {"said": said, "moved": moved, "after": run(params, optimizer, 2)}


def failing_late(rank):
    """As on an accelerator, where outcomes are read after the step."""
    params, optimizer = build(ds.DashShampoo, 0, ds.DDPDistributedConfig())
    for lists in optimizer._per_group_state_lists:
        lists["distributor"].is_late = lambda: True

    def fail():
        raise ZeroDivisionError("noticed late")

    run(params, optimizer, 0, num_steps=1)
    if rank == 1:
        optimizer._settle = fail
    set_gradients(params, 1)
    return message(optimizer.step)


def averaging(rank, config, mode):
    """The optimizer is constructed before rank 0's weights are broadcast."""
    params, optimizer = build(
        ds.DashShampoo, rank, ds.DDPDistributedConfig(), iterate_averaging_config=config
    )
    for p in params:
        dist.broadcast(p.data, src=0)
    if mode == "eval first":
        optimizer.eval()
        optimizer.train()
    found = run(params, optimizer, 0)
    optimizer.eval()
    single = ds.SingleDeviceDistributedConfig()
    expected, reference = build(ds.DashShampoo, 0, single, iterate_averaging_config=config)
    trained = run(expected, reference, 0)
    reference.eval()
    return {
        "found": [found, [p.detach().clone() for p in params]],
        "expected": [trained, [p.detach().clone() for p in expected]],
    }


def two_dimensions(rank):
    config = ds.DashDDPDistributedConfig(replicas=init_device_mesh("cpu", (2, 2)))
    return message(build, ds.DashShampoo, 0, config)


def joining(rank):
    """Rank 1 has fewer batches than rank 0."""
    from torch.distributed.algorithms.join import Join

    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(9, 5))
    optimizer = ds.DashShampoo(
        model.parameters(),
        lr=0.1,
        epsilon=1e-6,
        max_preconditioner_dim=4,
        distributed_config=ds.DDPDistributedConfig(),
    )
    steps = 0

    def train():
        nonlocal steps
        with Join([model, optimizer]):
            for _ in range(3 if rank == 1 else 5):
                optimizer.zero_grad()
                model(torch.ones(2, 9)).square().sum().backward()
                optimizer.step()
                steps += 1

    return message(train), steps
