"""Meta's own example config: with `_target_` changed it gives a DashShampoo that does the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dash_shampoo as ds

meta = pytest.importorskip("distributed_shampoo", reason="Meta's package is not importable")
omegaconf = pytest.importorskip("omegaconf", reason="the extra `dev` is not installed")
hydra_utils = pytest.importorskip("hydra.utils", reason="the extra `dev` is not installed")

CONFIG = Path(meta.__file__).parent / "examples" / "configs" / "optimizer" / "shampoo.yaml"
pytestmark = pytest.mark.skipif(
    not CONFIG.is_file(), reason="Meta's package comes without its examples"
)


def load(namespace):
    omegaconf.OmegaConf.register_new_resolver(
        "weight_decay_type", lambda name: namespace.WeightDecayType[name], replace=True
    )
    config = omegaconf.OmegaConf.load(CONFIG)
    omegaconf.OmegaConf.resolve(config)
    return config


def change_targets(node):
    """Every class by its name in dash_shampoo; the optimizer's is another."""
    if omegaconf.OmegaConf.is_dict(node):
        if "_target_" in node:
            name = node._target_.split(".")[-1]
            name = "DashShampoo" if name == "DistributedShampoo" else name
            node._target_ = f"dash_shampoo.{name}"
        for key in node:
            change_targets(node[key])


def run(config):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    optimizer = hydra_utils.instantiate(config)(network.parameters())
    for step in range(24):
        generator = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return list(network.parameters()), optimizer


@pytest.mark.parametrize("which", ["optimizer alone", "all classes"])
@pytest.mark.parametrize("shrunk", [False, True])
def test_the_config_runs(which, shrunk):
    theirs = load(meta)
    if ds.base.name == "meta" and which == "optimizer alone":
        mine = load(meta)
        mine._target_ = "dash_shampoo.DashShampoo"
    elif which == "all classes":
        mine = load(ds)
        change_targets(mine)
    else:
        pytest.skip("the embedded base has no use for configs of Meta's classes")
    if shrunk:
        for config in (theirs, mine):
            config.precondition_frequency = 10
            config.start_preconditioning_step = 20
            config.max_preconditioner_dim = 8
    expected, _ = run(theirs)
    found, optimizer = run(mine)
    assert type(optimizer) is ds.DashShampoo
    for p, q in zip(found, expected, strict=True):
        error = torch.linalg.vector_norm(p - q) / torch.linalg.vector_norm(q)
        assert error <= 1e-4  # as for the README's examples
