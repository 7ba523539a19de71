"""`fully_shard` after the construction: the optimizer's parameters get no gradients any more."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = """
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    import dash_shampoo as ds

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    optimizer = ds.DashShampoo(model.named_parameters())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    model(torch.randn(4, 8)).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        print(error)
    dist.destroy_process_group()
"""


def test_it_is_an_error_that_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Parameter '0.weight' has no gradient" in done.stdout
    assert "fully_shard first" in done.stdout
