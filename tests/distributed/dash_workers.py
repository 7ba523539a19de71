"""What the processes of the tests of DashShampoo do: many cases in one process group, since starting it
takes longer than all of them."""

from __future__ import annotations

import io
import logging
import traceback

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dash_shampoo as ds
from dash_shampoo.base import SHAMPOO_PRECONDITIONER_LIST
from dash_shampoo.preconditioners import StackedRootInvShampooPreconditionerList
from tests.base.cases import SHAPES, flatten, gradients, parameters, relative_error

logging.getLogger("dash_shampoo").setLevel(logging.ERROR)


def newton_db(**arguments):
    """With root 4 for tensors of order 3, since it can't do 6."""
    return ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=ds.NewtonDBConfig(**arguments),
        inverse_exponent_override={3: 0.25},
    )


SOLVERS = {
    "eigen": ds.RootInvShampooPreconditionerConfig(),
    "newton_db": newton_db(),
    "power_iteration": newton_db(scaling=ds.PowerIterationScaling()),
    "default": ds.DefaultDashConfig,
}
NUM_STEPS = 5


def settings(solver):
    """The constructor's arguments: damped so far that round-off stays round-off in the roots."""
    return {
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "epsilon": 1e-2,
        "weight_decay": 0.01,
        "max_preconditioner_dim": 8,
        "precondition_frequency": 2,
        "grafting_config": ds.AdamPreconditionerConfig(),
        "preconditioner_config": SOLVERS[solver],
    }


def distribution(kind, mesh_shape=None, **arguments):
    """A config, and what makes a tensor one of a parameter or gradient under it."""
    if kind == "ddp":
        return ds.DDPDistributedConfig(**arguments), torch.clone
    mesh = init_device_mesh(
        "cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :]
    )
    placements = [Replicate(), Shard(0)][-len(mesh_shape) :]
    if kind == "hybrid_shard":
        config = ds.HybridShardDistributedConfig(device_mesh=mesh, **arguments)
    else:
        config = ds.FullyShardDistributedConfig(**arguments)
    return config, lambda tensor: distribute_tensor(tensor, mesh, placements)


class _Messages(TorchDispatchMode):
    """Names of the collectives, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def messages(kind, **arguments):
    """The collectives of every step of two groups of parameters."""
    config, distribute = distribution(kind, **arguments)
    shapes = [shape for shape in SHAPES if shape]  # a scalar has no rows to be sharded
    params = [torch.nn.Parameter(distribute(p.detach())) for p in parameters(torch.float32, shapes)]
    groups = [{"params": params[::2]}, {"params": params[1::2]}]
    optimizer = ds.DashShampoo(groups, distributed_config=config, **settings("default"))
    counted = []
    for grads in gradients(NUM_STEPS, dtype=torch.float32, shapes=shapes):
        for param, grad in zip(params, grads, strict=True):
            param.grad = distribute(grad)
        with _Messages() as seen:
            optimizer.step()
        counted.append(seen.names)
    return counted


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stacks_of(optimizer):
    """Spans of memory of all factor matrices and their roots."""
    spans = []
    for state_lists in optimizer._per_group_state_lists:
        lists = state_lists[SHAMPOO_PRECONDITIONER_LIST]
        assert isinstance(lists, StackedRootInvShampooPreconditionerList)
        for stack in (*lists._factors, *lists._inverse_factors):
            begin = stack.data.data_ptr()
            spans.append((begin, begin + stack.data.numel() * stack.data.element_size()))
    return spans


def set_gradients(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def compare(solver, kind, shapes=SHAPES, mesh_shape=None, **arguments):
    """DashShampoo on this rank's part of the parameters, beside one that has just them in one process.

    Returns:
        "errors" of the parameters by step; the "trajectory"; whether the steps have drawn from the
        "global_generator"; the number of this rank's blocks; and for a solver that the base has too,
        its "base_errors".
    """
    if kind != "ddp":
        shapes = [shape for shape in shapes if shape != ()]  # a scalar can't be sharded
    config, distribute = distribution(kind, mesh_shape, **arguments)

    def build(optimizer_class):
        params = [
            torch.nn.Parameter(distribute(p.detach())) for p in parameters(torch.float32, shapes)
        ]
        return params, optimizer_class(params, distributed_config=config, **settings(solver))

    params, optimizer = build(ds.DashShampoo)
    of_base, base = build(ds.DistributedShampoo) if solver == "eigen" else (None, None)
    held = [index for index, p in enumerate(params) if local(p).numel() > 0]
    twins = [torch.nn.Parameter(local(params[index].detach()).clone()) for index in held]
    alone = ds.DashShampoo(twins, **settings(solver)) if twins else None

    result = {"errors": [0.0], "base_errors": [0.0], "trajectory": [], "global_generator": False}
    for grads in gradients(NUM_STEPS, "changing", torch.float32, shapes):
        grads = [None if grad is None else distribute(grad) for grad in grads]
        set_gradients(params, grads)
        generator = torch.get_rng_state()
        optimizer.step()
        result["global_generator"] |= not torch.equal(generator, torch.get_rng_state())
        if alone is not None:
            set_gradients(twins, [None if grads[i] is None else local(grads[i]) for i in held])
            alone.step()
        if base is not None:
            set_gradients(of_base, grads)
            base.step()
            pairs = zip(params, of_base, strict=True)
            result["base_errors"] += [relative_error(local(p), local(q)) for p, q in pairs]
        pairs = zip([params[index] for index in held], twins, strict=True)
        result["errors"] += [relative_error(local(p), q) for p, q in pairs]
        result["trajectory"].append([local(p).detach().clone() for p in params])
    distributor = optimizer._per_group_state_lists[0]["distributor"]
    result["num_blocks"] = len(distributor.local_blocked_params)
    return result


def saved(kind, mesh_shape=None):
    """Sizes of files: of this rank under both classes and of one process; where the state lies."""
    shapes = [(64, 48), (48, 64), (40,), (96, 32)]
    config, distribute = distribution(kind, mesh_shape)
    large = settings("eigen") | {"max_preconditioner_dim": 32}
    optimizers = {}
    for name, optimizer_class, changes in (
        ("dash", ds.DashShampoo, {"distributed_config": config}),
        ("base", ds.DistributedShampoo, {"distributed_config": config}),
        ("alone", ds.DashShampoo, {}),
    ):
        params = [torch.nn.Parameter(p.detach()) for p in parameters(torch.float32, shapes)]
        grads = gradients(1, dtype=torch.float32, shapes=shapes)[0]
        if changes:
            params = [torch.nn.Parameter(distribute(p.detach())) for p in params]
            grads = [distribute(grad) for grad in grads]
        optimizers[name] = optimizer_class(params, **large, **changes)
        set_gradients(params, grads)
        optimizers[name].step()
    result = {"bytes": {}}
    for name, optimizer in optimizers.items():
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        result["bytes"][name] = file.tell()

    state = dict(flatten(optimizers["dash"].state_dict()["state"]))
    matrices = {key: value for key, value in state.items() if "factor_matrices" in str(key)}
    spans = stacks_of(optimizers["dash"])
    owned = [value for value in matrices.values() if local(value).numel() > 0]
    result |= {
        "keys": {key for key, value in matrices.items() if local(value).numel() > 0},
        "dtensors": [isinstance(value, DTensor) for value in owned],
        "in_stacks": [any(b <= local(v).data_ptr() < e for b, e in spans) for v in owned],
        "own_storage": [
            local(v).untyped_storage().nbytes() == v.to_local().numel() * v.element_size()
            for v in owned
            if isinstance(v, DTensor)
        ],
        "of_stacks": sum(e - b for b, e in spans),
        "of_matrices": sum(local(v).numel() * v.element_size() for v in owned),
    }
    return result


def everything(rank, cases):
    """The result of each case by name, or the traceback of its error."""
    results = {}
    for name, (function, *args, arguments) in cases.items():
        try:
            results[name] = function(*args, **arguments)
        except Exception:  # the others have a right to be tested
            results[name] = traceback.format_exc()
    return results
