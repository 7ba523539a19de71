"""Every list against Meta's own: identical gradients, the same parameters and the same state.

The first eigenvectors are taken after 20 steps, when every factor matrix has full rank: those of a
kernel are arbitrary, and directions depend on them.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import dash_shampoo as ds
from tests.preconditioners.list_table import LISTS, MODELS, Row, build, flat, gradients, parameters

TOLERANCE = 1e-7
START = 20

pytestmark = pytest.mark.skipif(ds.base.name != "meta", reason="needs Meta's package")
each_row = pytest.mark.parametrize("row", LISTS, ids=str)


def same(path: str, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if path.split("/")[-2] == "factor_matrices_eigenvectors":  # unique up to the columns' signs
        ours, theirs = ours.abs(), theirs.abs()
    scale = max(float(theirs.double().norm()), 1e-3)
    return float((ours.double() - theirs.double()).norm()) <= TOLERANCE * scale


def run_groups(
    row: Row,
    shapes: tuple[tuple[int, ...], ...],
    missing: str = "never",
    steps: int = 50,
    **options: Any,
) -> tuple[list[torch.nn.Parameter], Any]:
    """Steps with every other parameter in a group of its own settings."""
    params = parameters(shapes, torch.float64)
    # peak_lr is given, as Meta's class takes the constructor's lr for that.
    second = {"lr": 0.01, "peak_lr": 0.01, "weight_decay": 0.1}
    groups = [{"params": params[::2]}, {"params": params[1::2], **second}]
    optimizer = build(row, groups, torch.float64, **options)
    for grads in gradients(shapes, torch.float64, steps, missing):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, optimizer


def compare(
    row: Row,
    shapes: tuple[tuple[int, ...], ...] | None = None,
    missing: str = "never",
    **options: Any,
) -> None:
    options = {"start_preconditioning_step": START, **options}
    shapes = shapes or row.shapes
    params, optimizer = run_groups(row, shapes, missing, **options)
    others, other = run_groups(row, shapes, missing, cls=ds.DistributedShampoo, **options)
    for param, theirs in zip(params, others, strict=True):
        assert torch.isfinite(theirs).all()
        assert same("/param/0", param, theirs)
    state, their_state = (flat(o.state_dict()["state"]) for o in (optimizer, other))
    assert state.keys() == their_state.keys()
    for path, tensor in state.items():
        assert tensor.shape == their_state[path].shape, path
        assert tensor.dtype == their_state[path].dtype, path
        assert same(path, tensor, their_state[path]), path


@each_row
@pytest.mark.parametrize("frequency", [1, 5])
@pytest.mark.parametrize("missing", ["never", "some", "alternating"])
@pytest.mark.parametrize("model", MODELS)
def test_fifty_steps_of_two_groups(row: Row, model: str, missing: str, frequency: int) -> None:
    compare(row, row.models[model], missing, precondition_frequency=frequency)


@each_row
@pytest.mark.parametrize(
    "options",
    [
        {"grafting_config": ds.AdamPreconditionerConfig(beta2=0.95)},
        {"betas": (0.0, 1.0)},
        {"weight_decay": 0.1, "use_bias_correction": False},
        {"iterate_averaging_config": ds.ScheduleFreeConfig()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_step(row: Row, options: dict[str, object]) -> None:
    compare(row, steps=30, **options)


@each_row
@pytest.mark.parametrize("model", MODELS)
def test_the_state_takes_the_bytes_of_the_base_s(row: Row, model: str) -> None:
    """In memory, by kind, and in a file: a view must not drag its whole stack along."""
    kinds, sizes = [], []
    for cls in (ds.DashShampoo, ds.DistributedShampoo):
        _, optimizer = run_groups(row, row.models[model], steps=2, cls=cls)
        state = flat(optimizer.state_dict()["state"])
        kinds.append({path: t.numel() * t.element_size() for path, t in state.items()})
        sizes.append(
            file_size([t.clone() if cls is not ds.DashShampoo else t for t in state.values()])
        )
    assert kinds[0] == kinds[1]
    assert sizes[0] <= 1.02 * sizes[1]


def file_size(tensors: list[torch.Tensor]) -> int:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.tell()
