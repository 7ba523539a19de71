"""Without grafting, a root that round-off made multiplies no gradient; one of a stated damping does."""

from __future__ import annotations

import pytest
import torch

import dash_shampoo as ds

CONFIGS = {
    "eigen": ds.RootInvShampooPreconditionerConfig(),
    "unpacked": ds.RootInvShampooPreconditionerConfig(use_symmetric_packing=False),
    "newton_db": ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=ds.NewtonDBConfig()
    ),
    "eigendecomposed": ds.EigendecomposedShampooPreconditionerConfig(),
    "kl": ds.RootInvKLShampooPreconditionerConfig(),
    "soap": ds.EigenvalueCorrectedShampooPreconditionerConfig(),
    "default": ds.DefaultDashConfig,
}


def losses_of(config, **settings):
    """An adapter W + B·A whose A has gradients of zero at first."""
    torch.manual_seed(0)
    weight, target = torch.randn(8, 32), torch.randn(8, 32) * 0.1
    a = torch.nn.Parameter(torch.randn(4, 32) / 6)
    b = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = ds.DashShampoo(
        [a, b],
        lr=1e-3,
        precondition_frequency=5,
        preconditioner_config=CONFIGS[config],
        **settings,
    )
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = ((weight + b @ a) - (weight + target)).square().sum()
        loss.backward()
        if step < 5:
            a.grad.zero_()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {"betas": (0.0, 0.95)},
        {"betas": (0.9, 0.999)},
        {"betas": (0.9, 1.0)},
        {"betas": (0.0, 0.95), "use_bias_correction": False},
    ],
    ids=str,
)
def test_an_adapter_without_grafting_does_not_explode(config, settings):
    losses = losses_of(config, **settings)
    assert max(losses) <= 2 * losses[0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("epsilon", "is_limited"), [(1e-12, True), (1e-3, False)])
@pytest.mark.parametrize("config", ["eigen", "unpacked", "eigendecomposed"])
def test_only_an_undamped_block_is_limited(config, epsilon, is_limited):
    """A gradient that is orthogonal to all before it, and comes between two refreshes."""
    p = torch.nn.Parameter(torch.zeros(6))
    optimizer = ds.DashShampoo(
        [p],
        lr=1.0,
        betas=(0.0, 0.9),
        epsilon=epsilon,
        precondition_frequency=2,
        preconditioner_config=CONFIGS[config],
    )
    for axis in (0, 0, 1):
        before = p.detach().clone()
        p.grad = torch.eye(6)[axis]
        optimizer.step()
    length = (p.detach() - before).norm()
    weight = 0.1 / (1 - 0.9**3)
    expected = (6 / weight) ** 0.5 if is_limited else epsilon**-0.5
    torch.testing.assert_close(length, torch.tensor(expected), rtol=1e-3, atol=0.0)
