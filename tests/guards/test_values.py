"""Gradients of any size and dtype, and what a step that is refused leaves behind."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

import dash_shampoo as ds
from tests.guards.common import (
    CONFIGS,
    assert_same_state,
    construct,
    leaves,
    network,
    train,
    values,
)

pytestmark = pytest.mark.parametrize("config", CONFIGS)

GRAFTINGS = {
    "none": None,
    "adam": ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
    "rmsprop": ds.RMSpropPreconditionerConfig(),
    "adagrad": ds.AdaGradPreconditionerConfig(),
    "sgd": ds.SGDPreconditionerConfig(),
}
KINDS = {
    "constant": lambda i: torch.ones(8, 6),
    "rank 1": lambda i: torch.ones(8, 1) @ noise(i, 1, 6),
    "one-hot": lambda i: torch.eye(8, 6) * (torch.arange(8) == 1)[:, None],
    "noise": lambda i: noise(i, 8, 6),
}


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grafting", GRAFTINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_any_size(config, grafting, dtype, kind):
    """From what underflows when it is squared to what all but overflows."""
    sizes = [0.0, 1e-38, 1e-20, 1e-10, 1e-5, 1.0, 300.0, 1e10, 1e15, 1e18]
    for size in sizes if dtype is not torch.float16 else sizes[:7]:
        p = torch.nn.Parameter(torch.zeros(8, 6, dtype=dtype))
        optimizer = construct([p], config, lr=1e-4, grafting_config=GRAFTINGS[grafting])
        for step in range(4):
            p.grad = (size * KINDS[kind](step).double()).to(dtype)
            optimizer.step()
        state = [v for _, v in leaves(optimizer.state_dict()["state"]) if v.is_floating_point()]
        # SGD's norm is the gradient's own.
        if grafting != "sgd" and (grafting != "none" or 1e-10 < size < 1e10):
            assert torch.isfinite(p).all(), size
        assert all(torch.isfinite(value).all() for value in state), size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_healthy_training_counts_no_failure(config, dtype):
    """Factor matrices of vectors have rank 1 at first, and a gradient of half precision has its round-off."""
    model = network(dtype=dtype)
    before = values(model)
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(20))
    assert values(model).isfinite().all()
    assert (values(model) != before).float().mean() > 0.9
    assert optimizer.failure_counts() == {}
    assert optimizer.gradient_failure_counts() == {}


@pytest.mark.parametrize("grafting", ["adam", "rmsprop"])
def test_a_second_moment_that_underflows_divides_nothing(config, grafting):
    p = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.float16))
    optimizer = construct([p], config, lr=0.1, grafting_config=GRAFTINGS[grafting])
    for step in range(3):
        p.grad = (1e-5 * noise(step, 16, 16)).half()
        optimizer.step()
    assert 0.0 < p.abs().max() < 1.0


def test_mixed_dtypes_in_one_group(config):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    params = [torch.nn.Parameter(torch.ones(8, 8, dtype=dtype)) for dtype in dtypes]
    optimizer = construct(params, config)
    for step in range(4):
        for p in params:
            p.grad = noise(step, 8, 8).to(p.dtype)
        optimizer.step()
    for p in params:
        assert torch.isfinite(p).all()
        assert not torch.equal(p.detach(), torch.ones_like(p))
    resumed = construct(params, config)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(resumed, optimizer)


def test_gradients_in_another_dtype_than_their_parameter(config):
    p, q = (torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has gradients in the parameter's dtype only")
    p.grad_dtype = None
    optimizers = [construct([one], config) for one in (p, q)]
    for step in range(3):
        p.grad, q.grad = noise(step, 4, 4), noise(step, 4, 4).bfloat16()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(p, q)


def test_state_that_is_emptied_begins_anew(config):
    """As in torch's optimizers."""
    model, fresh = network(), network(seed=1)
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    fresh.load_state_dict(model.state_dict())
    optimizer.state.clear()
    train(model, optimizer, range(3))
    expected = construct(fresh.parameters(), config)
    train(fresh, expected, range(3))
    assert torch.equal(values(model), values(fresh))
    assert_same_state(optimizer, expected)


@pytest.mark.parametrize(
    "averaging", [ds.ScheduleFreeConfig(), ds.GeneralizedPrimalAveragingConfig()]
)
def test_a_step_in_eval_mode_changes_nothing(config, averaging):
    model = network()
    optimizer = construct(model.parameters(), config, iterate_averaging_config=averaging)
    train(model, optimizer, range(3))
    optimizer.eval()
    weights = values(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="eval mode"):
        train(model, optimizer, range(3, 4))
    assert torch.equal(weights, values(model))
    found, expected = (dict(leaves(s["state"])) for s in (optimizer.state_dict(), before))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_numbers_of_numpy_are_read_weights_only(config):
    optimizer = construct(
        network().parameters(),
        config,
        lr=np.float64(0.01),
        betas=(np.float32(0.9), np.float64(0.95)),
        precondition_frequency=np.int64(2),
    )
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    kinds = [type(v) for v in (group["lr"], *group["betas"], group["precondition_frequency"])]
    assert kinds == [float, float, float, int]


WITHOUT_FACTORS = {
    "adam": lambda: ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
    "rmsprop": lambda: ds.RMSpropPreconditionerConfig(beta2=0.95, epsilon=1e-8),
    "scalar": lambda: ds.ScalarAdaGradPreconditionerConfig(),
    "sign": lambda: ds.SignDescentPreconditionerConfig(),
    "spectral": lambda: ds.SpectralDescentPreconditionerConfig(),
}


@pytest.mark.parametrize("kind", WITHOUT_FACTORS)
def test_groups_without_factor_matrices_treat_bad_gradients_as_the_others(config, kind):
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    matrices, others = ({"params": [p]} for p in params)
    others |= {"preconditioner_config": WITHOUT_FACTORS[kind](), "grafting_config": None}
    optimizer = construct([matrices, others], config)
    twin = construct([{"params": [torch.nn.Parameter(torch.ones(4, 3))]}], config)

    def step(value):
        for p in (*params, twin.param_groups[0]["params"][0]):
            p.grad = torch.linspace(-1.0, 1.0, 12).view(4, 3).clone()
        params[1].grad[0, 0] = value
        optimizer.step()
        twin.step()

    step(0.5)
    before = [p.detach().clone() for p in params]
    if config == "eigen":
        with pytest.raises(ds.PreconditionerValueError, match="The gradient of"):
            step(float("nan"))
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        return
    step(float("nan"))
    step(0.5)
    assert torch.equal(params[0], twin.param_groups[0]["params"][0])
    assert params[1].isfinite().all()
    assert sum(optimizer.gradient_failure_counts().values()) == 1
