"""Every list against Meta's own: identical gradients, the same parameters and the same state.

The first eigenvectors are taken after 20 steps, when every factor matrix has full rank: those of a
kernel are arbitrary, and directions depend on them.
"""

from __future__ import annotations

import pytest
import torch

import dash_shampoo as ds
from tests.preconditioners.list_table import LISTS, Row, flat, run

pytestmark = pytest.mark.skipif(ds.base.name != "meta", reason="needs Meta's package")
each_row = pytest.mark.parametrize("row", LISTS, ids=str)


def same(path: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    if path.split("/")[-2] == "factor_matrices_eigenvectors":  # unique up to the columns' signs
        ours, theirs = ours.abs(), theirs.abs()
    scale = max(float(theirs.double().norm()), 1e-3)
    return float((ours.double() - theirs.double()).norm()) <= tolerance * scale


def compare(row: Row, dtype: torch.dtype, steps: int, tolerance: float, **options: object) -> None:
    options = {"start_preconditioning_step": 20, **options}
    params, optimizer = run(row, dtype, steps, **options)  # type: ignore[arg-type]
    others, other = run(row, dtype, steps, cls=ds.DistributedShampoo, **options)  # type: ignore[arg-type]
    for param, theirs in zip(params, others, strict=True):
        assert torch.isfinite(theirs).all()
        assert same("/param/0", param, theirs, tolerance)
    state, their_state = (flat(o.state_dict()["state"]) for o in (optimizer, other))
    assert state.keys() == their_state.keys()
    for path, tensor in state.items():
        assert tensor.shape == their_state[path].shape, path
        assert tensor.dtype == their_state[path].dtype, path
        assert same(path, tensor, their_state[path], tolerance), path


@each_row
@pytest.mark.parametrize("frequency", [1, 5])
def test_fifty_steps_in_float64(row: Row, frequency: int) -> None:
    compare(row, torch.float64, 50, 1e-7, precondition_frequency=frequency)


@each_row
@pytest.mark.parametrize("missing", ["some", "alternating"])
def test_blocks_without_a_gradient(row: Row, missing: str) -> None:
    compare(
        row,
        torch.float64,
        70,
        1e-7,
        missing=missing,
        precondition_frequency=2,
        start_preconditioning_step=50,
    )


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
    compare(row, torch.float64, 30, 1e-7, **options)
