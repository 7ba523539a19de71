"""Every preconditioner of Meta's works: stacked, or delegated with one line that says so."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList

meta = pytest.importorskip("distributed_shampoo", reason="Meta's package is not importable")
if ds.base.name != "meta":
    pytest.skip("the embedded base leaves these preconditioners out", allow_module_level=True)

CONFIGS = [
    cls
    for cls in (getattr(meta, name) for name in meta.__all__)
    if isinstance(cls, type)
    and issubclass(cls, meta.PreconditionerConfig)
    and not inspect.isabstract(cls)
]
ELEMENTWISE = {
    ds.SGDPreconditionerConfig,
    ds.AdaGradPreconditionerConfig,
    ds.RMSpropPreconditionerConfig,
    ds.AdamPreconditionerConfig,
}
STACKED = set(CONFIGS) - ELEMENTWISE


def run(optimizer_class, config):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(8, 8), (20, 13), (8, 6)]
    ]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = optimizer_class(
        groups,
        lr=0.1,
        betas=(0.9, 0.99),
        epsilon=1e-6,
        max_preconditioner_dim=64,
        precondition_frequency=2,
        preconditioner_config=config,
        # Spectral descent sets the dimensionality in the config, which by default is one for all.
        distributed_config=ds.SingleDeviceDistributedConfig(),
        grafting_config=ds.AdamPreconditionerConfig(),
    )
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


def test_the_discovery_finds_every_kind():
    names = {cls.__name__.removesuffix("PreconditionerConfig") for cls in CONFIGS}
    assert names >= {
        "RootInvShampoo",
        "RootInvKLShampoo",
        "EigendecomposedShampoo",
        "EigendecomposedKLShampoo",
        "EigenvalueCorrectedShampoo",
        "SpectralDescent",
        "SignDescent",
        "SGD",
        "Adam",
    }


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda cls: cls.__name__)
def test_config(config_class, caplog):
    expected, base = run(ds.DistributedShampoo, config_class())
    with caplog.at_level(logging.INFO, logger="dash_shampoo"):
        found, dash = run(ds.DashShampoo, config_class())
    lines = [r for r in caplog.records if r.name.startswith("dash_shampoo")]
    lists = [state["shampoo_preconditioner_list"] for state in dash._per_group_state_lists]
    if config_class in STACKED:
        assert lines == []
        assert all(isinstance(x, StackedPreconditionerList) for x in lists)
    else:
        theirs = [state["shampoo_preconditioner_list"] for state in base._per_group_state_lists]
        assert [type(x) for x in lists] == [type(x) for x in theirs]
        # One line per group, none per step.
        assert len(lines) == 2
        assert all(r.levelno == logging.INFO and config_class.__name__ in r.message for r in lines)
    for p, q in zip(expected, found, strict=True):
        assert torch.isfinite(q).all()
        # How close the stacked ones are is what tests/preconditioners measures.
        assert config_class in STACKED or torch.equal(q, p)
