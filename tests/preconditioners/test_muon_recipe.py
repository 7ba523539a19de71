"""The recipe of the documents for those who come from torch.optim.Muon gives its trajectory."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import dash_shampoo as ds


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_matrices_go_as_muon_s(scale: str) -> None:
    torch.manual_seed(0)
    shapes = [(32, 16), (16, 32), (24, 24)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    function = ds.match_rms_adamw if scale == "match_rms_adamw" else ds.muon_original
    optimizer = ds.DashShampoo(
        ours,
        lr=0.02,
        betas=(0.95, 1.0),
        beta3=0.95**2,
        weight_decay=0.1,
        max_preconditioner_dim=math.inf,
        preconditioner_config=ds.SpectralDescentPreconditionerConfig(
            orthogonalization_config=ds.MuonOrthogonalizationConfig(scale_by_dims_fn=function)
        ),
        distributed_config=ds.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
    )
    muon = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn=scale
    )
    starts = [param.detach().clone() for param in ours]
    for _ in range(10):
        for param, other in zip(ours, theirs, strict=True):
            param.grad = torch.randn(param.shape)
            other.grad = param.grad.clone()
        optimizer.step()
        muon.step()
    for param, other, start in zip(ours, theirs, starts, strict=True):
        # bf16 sums in another order.
        assert float((param - other).norm() / (other - start).norm()) < 0.02


def test_matrices_by_muon_and_the_rest_by_adam_in_one_optimizer() -> None:
    """Against two optimizers: torch's Muon and torch's AdamW."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(12, 16), torch.nn.Linear(16, 24), torch.nn.LayerNorm(24),
        torch.nn.Linear(24, 16), torch.nn.Linear(16, 12),
    )  # fmt: skip
    other = copy.deepcopy(model)
    start = copy.deepcopy(model)
    settings = {"betas": (0.95, 1.0), "beta3": 0.95**2, "max_preconditioner_dim": math.inf}
    groups = ds.param_groups(
        model,
        matrices={
            "preconditioner_config": ds.SpectralDescentPreconditionerConfig(
                orthogonalization_config=ds.MuonOrthogonalizationConfig()
            ),
            **settings,
        },
        head_names=("4.*",),
    )
    optimizer = ds.DashShampoo(
        groups,
        lr=0.02,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        distributed_config=ds.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
    )
    theirs = dict(other.named_parameters())
    matrices = [theirs[name] for name in ("1.weight", "3.weight")]
    muon = torch.optim.Muon(
        matrices, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    vectors = [p for p in theirs.values() if p.dim() < 2]
    rest = [theirs["0.weight"], theirs["4.weight"]]
    adamw = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.02,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for _ in range(10):
        for name, param in model.named_parameters():
            param.grad = torch.randn(param.shape)
            theirs[name].grad = param.grad.clone()
        for one in (optimizer, muon, adamw):
            one.step()
    begun = dict(start.named_parameters())
    for name, param in model.named_parameters():
        error = float((param - theirs[name]).norm() / (theirs[name] - begun[name]).norm())
        # Matrices are orthogonalised in bf16; the rest is fp32 all through.
        assert error < (0.02 if name in ("1.weight", "3.weight") else 1e-4), name


def test_what_the_base_changes_for_spectral_descent_stays_in_its_group():
    """Meta's class writes target_parameter_dimensionality=2 into the config that it is given."""
    shared = ds.SingleDeviceDistributedConfig()
    muon = ds.SpectralDescentPreconditionerConfig()
    for distributed_config in (shared, ds.DefaultSingleDeviceDistributedConfig):
        groups = [
            {"params": [torch.nn.Parameter(torch.ones(4, 4))], "preconditioner_config": muon},
            {"params": [torch.nn.Parameter(torch.ones(4, 4))]},
        ]
        optimizer = ds.DashShampoo(
            groups, distributed_config=distributed_config, max_preconditioner_dim=16
        )
        assert distributed_config.target_parameter_dimensionality == 1
        for group in groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones(4, 4)
        optimizer.step()
        state = optimizer.state[groups[1]["params"][0]]["block_0"]["shampoo"]
        # A dict on the embedded base, an object on Meta's.
        factors = state["factor_matrices"] if isinstance(state, dict) else state.factor_matrices
        assert len(factors) == 1  # one vector of 16, as without the other group
