"""`fully_shard` after the construction: the optimizer's parameters get no gradients any more."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dash_shampoo as ds
from tests.processes import run_apart

pytestmark = pytest.mark.distributed


def shard_late():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    optimizer = ds.DashShampoo(model.named_parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(torch.randn(4, 8)).square().mean().backward()
    try:
        optimizer.step()
    finally:
        dist.destroy_process_group()


def test_it_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"Parameter '0.weight' has no gradient") as error:
        run_apart(shard_late)
    assert "fully_shard first" in str(error.value)
