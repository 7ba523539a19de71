"""The recipe of the README for those who come from torch.optim.Muon gives its trajectory."""

from __future__ import annotations

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
