"""What the processes of test_distributed.py do: every list of the table in one process group."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

import dash_shampoo as ds
from tests.preconditioners.list_table import LISTS, Row, gradients, parameters, run

logging.getLogger("dash_shampoo").setLevel(logging.ERROR)
STEPS = 24
ROWS = [row for row in LISTS if row.name != "spectral_descent_svd"]


def settings(row: Row, config: object) -> dict[str, object]:
    dimensionality = row.options.get("distributed_config")
    if dimensionality is not None:
        config.target_parameter_dimensionality = dimensionality.target_parameter_dimensionality
    return {"start_preconditioning_step": 20, "distributed_config": config}


def alone() -> dict[str, list[torch.Tensor]]:
    results = {}
    for row in ROWS:
        params, _ = run(row, torch.float64, STEPS, start_preconditioning_step=20)
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
    return results


class Holder(torch.nn.Module):
    """The parameters of a row as those of a module."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(params)


def sharded(rank: int) -> dict[str, float]:
    """Parameters sharded by rows: finite, and the ranks' shards together move like whole blocks."""
    del rank
    lengths = {}
    for row in ROWS:
        # A shard of a single row is a vector, which spectral descent does not take.
        shapes = tuple(shape for shape in row.shapes if shape and shape[0] >= 4)
        row = dataclasses.replace(row, shapes=shapes)
        module = Holder(parameters(row.shapes, torch.float64))
        fully_shard(module)
        assert isinstance(module, FSDPModule)
        params = list(module.parameters())
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
                param.grad = torch.distributed.tensor.distribute_tensor(
                    grad, param.device_mesh, param.placements
                )
            optimizer.step()
        moved = [p.full_tensor().detach() - b for p, b in zip(params, before, strict=True)]
        assert all(torch.isfinite(m).all() and float(m.abs().max()) > 0 for m in moved), row.name
        lengths[row.name] = float(sum(m.square().sum() for m in moved))
    return lengths
