"""Hugging Face Accelerate: prepare, accumulation, clipping, bf16, save_state and load_state."""

from __future__ import annotations

import pytest
import torch

from tests.clients.common import SETTINGS, construct, loss_of, network, scheduler_of, values
from tests.guards.common import CONFIGS

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def run(config, steps, load=None, save_at=None, folder=None, precision="no"):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    model = network()
    optimizer = construct(model.named_parameters(), config, **SETTINGS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler_of(optimizer))
    start = 0
    if load is not None:
        accelerator.load_state(load)
        start = save_at
    for step in range(start, steps):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if folder is not None and step + 1 == save_at:
            accelerator.save_state(folder)
    return values(model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resume_is_exact(config, precision, tmp_path):
    before = values(network())
    straight = run(config, 12, save_at=6, folder=str(tmp_path), precision=precision)
    resumed = run(config, 12, load=str(tmp_path), save_at=6, precision=precision)
    assert torch.equal(straight, resumed)
    assert not torch.equal(straight, before)
