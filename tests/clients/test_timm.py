"""timm: its factory builds the optimizer, with its groups for weight decay and for layers."""

from __future__ import annotations

import pytest
import torch

import dash_shampoo as ds
from tests.guards.common import CONFIGS

# Without torchvision it is installed, but cannot be imported.
timm = pytest.importorskip("timm", reason="timm can't be imported", exc_type=ImportError)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_the_factory(config, layer_decay):
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(
        OptimInfo(
            name="dashshampoo",
            opt_class=ds.DashShampoo,
            description="Distributed Shampoo on stacks",
            has_eps=False,
            has_betas=True,
            defaults={
                "grafting_config": ds.AdamPreconditionerConfig(),
                "preconditioner_config": CONFIGS[config],
            },
        )
    )
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=32, num_heads=2
    )
    optimizer = create_optimizer_v2(
        model, opt="dashshampoo", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay
    )
    assert isinstance(optimizer, ds.DashShampoo)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    inputs, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
