"""What the processes of test_distributed.py do: every list of the table in one process group."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

import dash_shampoo as ds
from tests.preconditioners.list_table import ROWS as ALL_ROWS
from tests.preconditioners.list_table import Row, build, gradients, parameters, run

logging.getLogger("dash_shampoo").setLevel(logging.ERROR)
STEPS = 24
# Shares of spread refreshes are of a rank's own blocks, so that one process has others.
STAGGERED = [row for row in ALL_ROWS if row.name.endswith("_staggered")]
ROWS = [row for row in ALL_ROWS if row.name != "spectral_descent_svd" and row not in STAGGERED]


def settings(row: Row, config: object) -> dict[str, object]:
    dimensionality = row.options.get("distributed_config")
    if dimensionality is not None:
        config.target_parameter_dimensionality = dimensionality.target_parameter_dimensionality
    return {"start_preconditioning_step": 20, "distributed_config": config}


# Experts (E, m, n) and a fused matrix, cut into parts of rows; none goes over to another rank of two.
PARTS = (((8, 9, 7), 8), ((24, 8), (8, 4, 6, 6)))


def train_parts(make_groups: Any, give: Any, **options: Any) -> list[torch.nn.Parameter]:
    """Steps of SOAP on parameters that are cut into parts."""
    row = next(row for row in ROWS if row.name == "dash_soap")
    params = make_groups(parameters(tuple(shape for shape, _ in PARTS), torch.float64))
    groups = [
        {"params": [param], "row_parts": parts}
        for param, (_, parts) in zip(params, PARTS, strict=True)
    ]
    optimizer = build(row, groups, torch.float64, start_preconditioning_step=20, **options)
    for grads in gradients(tuple(shape for shape, _ in PARTS), torch.float64, STEPS):
        for param, grad in zip(params, grads, strict=True):
            param.grad = give(param, grad)
        optimizer.step()
    return params


def alone() -> dict[str, list[torch.Tensor]]:
    results = {}
    for row in ROWS:
        params, _ = run(row, torch.float64, STEPS, start_preconditioning_step=20)
        results[row.name] = [param.detach() for param in params]
    parts = train_parts(lambda params: params, lambda param, grad: grad)
    return {**results, "parts": [param.detach() for param in parts]}


def staggered(rank: int) -> dict[str, list[torch.Tensor]]:
    """As `shared`, the lists whose refreshes are spread."""
    del rank
    results = {}
    for row in STAGGERED:
        config = ds.DDPDistributedConfig(
            communication_dtype=torch.float64, num_trainers_per_group=-1
        )
        params, _ = run(row, torch.float64, STEPS, **settings(row, config))
        results[row.name] = [param.detach() for param in params]
    return results


def shared(rank: int) -> dict[str, list[torch.Tensor]]:
    """Every rank has all gradients; each computes its share of the blocks."""
    del rank
    results = {}
    for row in ROWS:
        config = ds.DDPDistributedConfig(
            communication_dtype=torch.float64, num_trainers_per_group=-1
        )
        params, _ = run(row, torch.float64, STEPS, **settings(row, config))
        results[row.name] = [param.detach() for param in params]
    config = ds.DDPDistributedConfig(communication_dtype=torch.float64, num_trainers_per_group=-1)
    parts = train_parts(lambda params: params, lambda param, grad: grad, distributed_config=config)
    return {**results, "parts": [param.detach() for param in parts]}


class Holder(torch.nn.Module):
    """The parameters of a row as those of a module."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def as_sharded(param: torch.nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    return torch.distributed.tensor.distribute_tensor(grad, param.device_mesh, param.placements)


def shards_of(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    module = Holder(params)
    fully_shard(module)
    return list(module.parameters())


def sharded_parts(rank: int) -> list[torch.Tensor]:
    """Whole parts lie on one rank: the same as in one process."""
    del rank
    config = ds.FullyShardDistributedConfig()
    params = train_parts(shards_of, as_sharded, distributed_config=config)
    return [param.full_tensor().detach() for param in params]


def sharded(rank: int) -> dict[str, float]:
    """Parameters sharded by rows: finite, and the ranks' shards together move like whole blocks."""
    del rank
    lengths = {}
    for row in ROWS:
        # A shard of a single row is a vector, which spectral descent does not take.
        shapes = tuple(shape for shape in row.shapes if shape and shape[0] >= 4)
        row = dataclasses.replace(row, shapes=shapes)
        params = shards_of(parameters(row.shapes, torch.float64))
        config = ds.FullyShardDistributedConfig()
        optimizer = ds.DashShampoo(
            params,
            lr=0.02,
            betas=(0.9, 0.95),
            epsilon=row.epsilon,
            max_preconditioner_dim=8,
            preconditioner_config=row.config(torch.float64),
            **settings(row, config),
        )
        before = [param.full_tensor().detach().clone() for param in params]
        for grads in gradients(row.shapes, torch.float64, 6):
            for param, grad in zip(params, grads, strict=True):
                param.grad = as_sharded(param, grad)
            optimizer.step()
        moved = [p.full_tensor().detach() - b for p, b in zip(params, before, strict=True)]
        assert all(torch.isfinite(m).all() and float(m.abs().max()) > 0 for m in moved), row.name
        lengths[row.name] = float(sum(m.square().sum() for m in moved))
    return lengths
