import math

import pytest
import torch

from experiments.tasks import DigitsTask, LlamaTask, fit


def adamw(lr):
    return lambda model: torch.optim.AdamW(model.parameters(), lr=lr)


def test_a_small_training_learns_and_repeats():
    task = LlamaTask(steps=12, width=16, sequence_length=16)
    losses = [fit(task, adamw(lr), seed=0).loss for lr in (0.02, 0.02, 1e-9)]
    assert losses[0] == losses[1]
    assert losses[0] < losses[2] - 0.3
    assert fit(task, adamw(0.02), seed=1).loss != losses[0]


def test_gradients_can_be_watched_and_divergence_is_told():
    task = LlamaTask(steps=6, width=16, sequence_length=16)
    seen = []
    fit(
        task, adamw(0.01), 0, lambda model, step: seen.append((step, model.head.weight.grad.norm()))
    )
    assert [step for step, _ in seen] == list(range(6))
    assert all(norm > 0 for _, norm in seen)
    diverged = fit(task, lambda model: torch.optim.SGD(model.parameters(), lr=1e30), 0)
    assert diverged.loss == math.inf


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    task = DigitsTask()
    assert fit(task, adamw(0.005), seed=0).loss < 0.3
