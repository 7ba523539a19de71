"""A small model that trains on batches given by the number of the step."""

from __future__ import annotations

import torch

import dash_shampoo as ds

# The base's default, and ours with everything that it switches on.
CONFIGS = {
    "eigen": ds.RootInvShampooPreconditionerConfig(),
    "dash": ds.DefaultDashConfig,
}


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return torch.nn.Sequential(*layers).to(dtype)


def construct(params, config="eigen", **settings):
    settings = {
        "lr": 0.01,
        "betas": (0.9, 0.95),
        "grafting_config": ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
        "preconditioner_config": CONFIGS[config],
    } | settings
    return ds.DashShampoo(params, **settings)


def loss_of(model, step):
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1000 + step))
    target = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.mse_loss(model(x.to(dtype)), (x @ target).to(dtype))


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model):
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def leaves(state, path=()):
    """The tensors of a state dict's "state", by their keys."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def assert_same_state(one, two):
    found, expected = (dict(leaves(o.state_dict()["state"])) for o in (one, two))
    assert found.keys() == expected.keys()
    assert len(expected) > 0
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
