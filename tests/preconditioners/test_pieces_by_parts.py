"""A piece that is worked on part by part, for the caches of a CPU, gives what the whole gives, to the bit."""

from __future__ import annotations

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.preconditioners import modes

GRAFTINGS = {
    "none": None,
    "sgd": ds.SGDPreconditionerConfig(),
    "adagrad": ds.AdaGradPreconditionerConfig(),
    "rmsprop": ds.RMSpropPreconditionerConfig(beta2=0.9),
    "adam": ds.AdamPreconditionerConfig(beta2=0.9),
}


def _train(dtype: torch.dtype, grafting: ds.PreconditionerConfig | None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 32), (16, 16), (7,), (4, 5, 6)]
    params = [
        torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype) * 0.1) for s in shapes
    ]
    optimizer = ds.DashShampoo(
        params,
        lr=0.01,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        max_preconditioner_dim=16,
        start_preconditioning_step=2,
        precondition_frequency=2,
        grafting_config=grafting,
        preconditioner_config=ds.DefaultDashConfig,
    )
    for step in range(5):
        for number, param in enumerate(params):
            is_missing = step == 3 and number == 1
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            param.grad = None if is_missing else grad
        optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grafting", GRAFTINGS)
def test_parts_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, grafting: str, dtype: torch.dtype
) -> None:
    whole = _train(dtype, GRAFTINGS[grafting])
    num_parts = []

    def counted(blocks: torch.Tensor, parts=modes.parts) -> list[slice]:
        num_parts.append(len(parts(blocks)))
        return parts(blocks)

    monkeypatch.setattr(modes, "_PART_BYTES", 2 * 16 * 16 * dtype.itemsize)
    for module in ("grafting", "modes"):
        monkeypatch.setattr(f"dash_shampoo.preconditioners.{module}.parts", counted)
    by_parts = _train(dtype, GRAFTINGS[grafting])
    assert max(num_parts) > 2
    for one, other in zip(whole, by_parts, strict=True):
        assert torch.equal(one, other)


def test_parts_cover_all_rows_in_order_and_only_a_cpu_is_cut(monkeypatch) -> None:
    monkeypatch.setattr(modes, "_PART_BYTES", 100)
    assert modes.parts(torch.zeros(7, 2, 6)) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert modes.parts(torch.zeros(2, 40)) == [slice(0, 1), slice(1, 2)]
    assert modes.parts(torch.zeros(0, 3)) == [slice(0, 0)]
    assert modes.parts(torch.zeros(5, 0)) == [slice(0, 5)]
    assert modes.parts(torch.zeros(7, 2, 6, device="meta")) == [slice(0, 7)]
