"""Meta's own examples, with the class name swapped, against Meta's optimizer on the same gradients."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dash_shampoo as ds
from tests.meta.readme_examples import EXAMPLES, ONLY_META

meta = pytest.importorskip("distributed_shampoo", reason="Meta's package is not importable")
META = SimpleNamespace(
    **{name: getattr(meta, name) for name in meta.__all__},
    ClassicMomentumConfig=meta.shampoo_types.ClassicMomentumConfig,
)
README = Path(meta.__file__).with_name("README.md")

# fp32 round-off of the factor matrices, amplified by their roots: the vectors' factors, sums of 20
# outer products of length 6, have a condition number of about 1e3.
TOLERANCE = 1e-4


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 2, bias=False),
        torch.nn.Flatten(),
        torch.nn.Linear(45, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 16, bias=False),
        torch.nn.Linear(16, 6),
    )


def construct(namespace, optimizer_class, example, shrunk):
    network = model()
    settings = EXAMPLES[example](namespace)
    if shrunk and "precondition_frequency" in settings:
        settings |= {
            "max_preconditioner_dim": 8,
            "precondition_frequency": 10,
            "start_preconditioning_step": 20,
        }
    groups = network.parameters()
    if "hidden" in settings:
        hidden = [network[0].weight, network[4].weight]
        others = [p for p in network.parameters() if all(p is not h for h in hidden)]
        groups = [
            {"params": hidden, **settings.pop("hidden")},
            {"params": others, **settings.pop("others")},
        ]
    return list(network.parameters()), optimizer_class(groups, **settings)


def step_with_random_gradients(params, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_every_example_is_there():
    text = README.read_text()
    in_readme = set(re.findall(r"^### Example (\d+):", text, re.MULTILINE))
    assert in_readme == {name.split()[0] for name in EXAMPLES}
    assert len(in_readme) == 7


@pytest.mark.parametrize("shrunk", [False, True], ids=["as-written", "shrunk"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, shrunk):
    if example in ONLY_META and ds.base.name != "meta":
        pytest.skip("the embedded base leaves this preconditioner out")
    expected, theirs = construct(META, meta.DistributedShampoo, example, shrunk)
    found, ours = construct(ds, ds.DashShampoo, example, shrunk)
    theirs.train()
    ours.train()
    for seed in range(24 if shrunk else 3):
        step_with_random_gradients(expected, theirs, seed)
        step_with_random_gradients(found, ours, seed)
    theirs.eval()
    ours.eval()
    for p, q in zip(expected, found, strict=True):
        assert torch.isfinite(p).all()
        error = torch.linalg.vector_norm(q - p) / torch.linalg.vector_norm(p)
        assert error <= TOLERANCE
