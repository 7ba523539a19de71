"""What every list promises, ours included, on whichever base: one table drives all."""

from __future__ import annotations

import copy

import pytest
import torch

import dash_shampoo as ds
from tests.preconditioners.list_table import (
    ROWS,
    Row,
    build,
    flat,
    gradients,
    parameters,
    run,
)

each_row = pytest.mark.parametrize("row", ROWS, ids=str)


def take_step(params, optimizer, grads) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


@each_row
def test_the_state_of_a_block_has_the_keys_of_the_base(row: Row) -> None:
    params, optimizer = run(row, torch.float32, 2)
    for param in params:
        blocks = [v for k, v in optimizer.state[param].items() if str(k).startswith("block")]
        assert blocks
        for block in blocks:
            if not row.keys:
                assert "shampoo" not in block
                continue
            record = block["shampoo"]
            names = record.keys() if isinstance(record, dict) else vars(record).keys()
            has_factors = isinstance(record, dict) and "factor_matrices" in names
            assert set(row.keys) <= set(names) or not has_factors


@each_row
def test_a_resume_is_exact(row: Row) -> None:
    all_gradients = list(gradients(row.shapes, torch.float32, 8))
    params = parameters(row.shapes, torch.float32)
    optimizer = build(row, params, torch.float32)
    for grads in all_gradients[:4]:
        take_step(params, optimizer, grads)
    resumed_params = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = build(row, resumed_params, torch.float32)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grads in all_gradients[4:]:
        take_step(params, optimizer, grads)
        take_step(resumed_params, resumed, grads)
    for param, other in zip(params, resumed_params, strict=True):
        assert torch.equal(param, other)
    state, other_state = (flat(o.state_dict()["state"]) for o in (optimizer, resumed))
    assert all(torch.equal(state[path], other_state[path]) for path in state)


@each_row
@pytest.mark.parametrize("missing", ["never", "alternating"])
def test_block_by_block_gives_the_same_as_bucket_by_bucket(
    row: Row, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _ = run(row, torch.float64, 30, missing, start_preconditioning_step=20)
    monkeypatch.setattr("dash_shampoo.optimizer.missing_step_seam", lambda: "the seam")
    others, _ = run(row, torch.float64, 30, missing, start_preconditioning_step=20)
    for param, other in zip(params, others, strict=True):
        assert torch.allclose(param, other, rtol=1e-8, atol=1e-10)


@each_row
def test_parameters_in_bf16_keep_a_state_in_float32(row: Row) -> None:
    params = parameters(row.shapes, torch.bfloat16)
    optimizer = build(row, params, torch.float32)
    for grads in gradients(row.shapes, torch.bfloat16, 6):
        take_step(params, optimizer, grads)
    assert all(torch.isfinite(param).all() and param.dtype == torch.bfloat16 for param in params)
    for path, tensor in flat(optimizer.state_dict()["state"]).items():
        if "/shampoo/" in path:
            assert tensor.dtype == torch.float32, path


@each_row
def test_zero_gradients_are_harmless(row: Row) -> None:
    params = parameters(row.shapes, torch.float32)
    optimizer = build(row, params, torch.float32)
    for _ in range(3):
        take_step(params, optimizer, [torch.zeros_like(param) for param in params])
    assert all(torch.isfinite(param).all() for param in params)


@each_row
def test_groups_have_their_own(row: Row) -> None:
    params = parameters(row.shapes, torch.float32)
    half = len(params) // 2
    config = row.config(torch.float32)
    optimizer = build(
        row,
        [
            {"params": params[:half], "lr": 0.0},
            {"params": params[half:], "preconditioner_config": config},
        ],
        torch.float32,
    )
    before = [param.detach().clone() for param in params]
    for grads in gradients(row.shapes, torch.float32, 3):
        take_step(params, optimizer, grads)
    assert all(torch.equal(p, b) for p, b in zip(params[:half], before[:half], strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(params[half:], before[half:], strict=True))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if "factor_matrices_eigenvectors" in row.keys], ids=str
)
@pytest.mark.parametrize("safety", [None, ds.SafetyConfig()], ids=["plain", "safe"])
def test_as_on_an_accelerator_it_gives_the_same(
    row: Row, safety: ds.SafetyConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU stands in for a device whose values the host has to wait for."""
    config = row.config(torch.float64)
    if safety is not None and not hasattr(config, "safety"):
        pytest.skip("the base's config has no safety")
    if safety is not None:
        config.safety = safety
    options = {"preconditioner_config": config, "start_preconditioning_step": 20}
    params, _ = run(row, torch.float64, 26, **options)
    for module in ("safety", "preconditioners.stacked", "preconditioners.eigenvectors"):
        monkeypatch.setattr(f"dash_shampoo.{module}.is_asynchronous", lambda device: True)
    monkeypatch.setattr(
        "dash_shampoo.preconditioners.eigenvalue_corrected.is_asynchronous", lambda device: True
    )
    monkeypatch.setattr("dash_shampoo.inverse_root.blocks._READABLE_DEVICES", set())
    others, _ = run(row, torch.float64, 26, **options)
    for param, other in zip(params, others, strict=True):
        assert torch.allclose(param, other, rtol=1e-7, atol=1e-9)
