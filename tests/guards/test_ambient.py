"""A step gives the same bits whatever the program has set around it."""

from __future__ import annotations

import contextlib

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.guards.ambient import neutral
from tests.guards.common import CONFIGS, assert_same_state, construct, network, train, values


@contextlib.contextmanager
def setting(setter, value, restored):
    setter(value)
    try:
        yield
    finally:
        setter(restored)


@contextlib.contextmanager
def newer_precision_setting():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients on": torch.enable_grad,
    "gradients off": torch.no_grad,
    "default dtype bf16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype fp64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "matmul precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "newer matmul precision": newer_precision_setting,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_step_in_strange_surroundings(config, name):
    runs = []
    for surroundings in (contextlib.nullcontext, SURROUNDINGS[name]):
        model = network()
        grads = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
            for p in model.parameters()
        ]
        averaging = ds.ScheduleFreeConfig()
        with surroundings():
            optimizer = construct(
                model.parameters(), config, weight_decay=0.1, iterate_averaging_config=averaging
            )
        for _ in range(4):
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad.clone()
            with surroundings():
                optimizer.step()
        with surroundings():
            optimizer.eval()
            optimizer.train()
            optimizer.load_state_dict(optimizer.state_dict())
        runs.append((model, optimizer))
    assert torch.equal(values(runs[0][0]), values(runs[1][0]))
    assert_same_state(runs[0][1], runs[1][1])
    # Nothing that it made refuses to be trained on.
    train(*runs[1], range(2))


def test_what_was_set_is_restored():
    def settings():
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_float32_matmul_precision(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )

    plain = settings()
    with contextlib.ExitStack() as stack:
        for name in ("autocast", "default dtype bf16", "default device", "matmul precision"):
            stack.enter_context(SURROUNDINGS[name]())
        strange = settings()
        with neutral(lambda: ["cpu"]):
            assert settings()[:6] == plain[:6]
            assert not torch.is_grad_enabled()
        assert settings() == strange
        with pytest.raises(ZeroDivisionError), neutral(lambda: ["cpu"]):
            raise ZeroDivisionError
        assert settings() == strange
    assert settings() == plain


def test_a_closure_runs_in_the_surroundings_of_the_program():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = construct([p])
    seen = []

    def closure():
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        p.grad = torch.ones(2, 2)
        return 3.0

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert optimizer.step(closure) == 3.0
    assert seen == [(True, True)]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_default_dtype_of_bf16_trains_bf16_parameters(config):
    results = []
    for surroundings in (contextlib.nullcontext, SURROUNDINGS["default dtype bf16"]):
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
        with surroundings():
            optimizer = construct([p], config)
            for _ in range(5):
                p.grad = torch.eye(8, dtype=torch.bfloat16)
                optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert results[0].diagonal().max() < -0.01
