"""Parameters that move, change or are replaced after the optimizer has seen them."""

from __future__ import annotations

import copy

import pytest
import torch

import dash_shampoo as ds
from tests.guards.common import CONFIGS, construct, leaves, network, train, values

pytestmark = pytest.mark.parametrize("config", CONFIGS)


def swap_data(model):
    for p in model.parameters():
        p.data = p.data.clone()


def vector_to_parameters(model):
    parameters = list(model.parameters())
    vector = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    torch.nn.utils.vector_to_parameters(vector, parameters)


def move_and_back(model):
    # As a Trainer does that puts the model on its device: new memory, the same parameters.
    for p in model.parameters():
        p.data = p.data.to(torch.float64).to(p.dtype)


def one_flat_buffer(model):
    # As FSDP and DDP's gradient buckets do with parameters.
    flat = torch.cat([p.data.reshape(-1) for p in model.parameters()])
    for p, part in zip(
        model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True
    ):
        p.data = part.view_as(p)


@pytest.mark.parametrize(
    "move",
    [swap_data, vector_to_parameters, move_and_back, one_flat_buffer],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("first_steps", [0, 3])
def test_moved_memory_changes_nothing(config, move, first_steps):
    runs = []
    for is_moved in (False, True):
        model = network()
        optimizer = construct(model.parameters(), config, weight_decay=0.1)
        train(model, optimizer, range(first_steps))
        if is_moved:
            move(model)
        train(model, optimizer, range(first_steps, first_steps + 4))
        runs.append((values(model), optimizer))
    assert torch.equal(runs[0][0], runs[1][0])
    one, two = (dict(leaves(o.state_dict()["state"])) for _, o in runs)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_evaluation_with_averaged_weights(config):
    """Weights are swapped for an evaluation, and back, twice."""
    plain, swapped = network(), network()
    optimizers = [construct(m.parameters(), config) for m in (plain, swapped)]
    for start in (0, 3):
        for model, optimizer in zip((plain, swapped), optimizers, strict=True):
            train(model, optimizer, range(start, start + 3))
        backup = [p.data for p in swapped.parameters()]
        for p in swapped.parameters():
            p.data = torch.zeros_like(p)
        for p, data in zip(swapped.parameters(), backup, strict=True):
            p.data = data.clone()
    for model, optimizer in zip((plain, swapped), optimizers, strict=True):
        train(model, optimizer, range(6, 8))
    assert torch.equal(values(plain), values(swapped))


def test_assigned_checkpoint(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    # The module has new parameters; whoever puts them into the groups goes on with them.
    optimizer.param_groups[0]["params"] = list(model.parameters())
    before = values(model)
    train(model, optimizer, range(2, 4))
    assert not torch.equal(before, values(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(config, dtype):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    factors = {
        k: v.clone() for k, v in leaves(optimizer.state_dict()["state"]) if "factor_matrices" in k
    }
    model.to(dtype)
    before = values(model)
    losses = train(model, optimizer, range(3, 20))
    assert losses[-1] < losses[0]
    assert not torch.equal(before, values(model))
    model.to(torch.float32)
    train(model, optimizer, range(20, 21))
    state = dict(leaves(optimizer.state_dict()["state"]))
    assert all(state[key].dtype == value.dtype for key, value in factors.items())
    assert int(optimizer.state[next(model.parameters())]["step"]) == 21


def test_another_memory_format(config):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 3)
    )
    models = [model, copy.deepcopy(model)]
    # Damped enough that roots do not magnify what the two formats round differently.
    optimizers = [construct(m.parameters(), config, epsilon=1e-6) for m in models]
    models[1].to(memory_format=torch.channels_last)
    x, y = torch.randn(16, 4, 8, 8), torch.randn(16, 3)
    for _ in range(4):
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(m(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=1e-3, atol=1e-4)


def test_a_gradient_of_any_layout(config):
    results = []
    for is_transposed in (False, True):
        p = torch.nn.Parameter(torch.ones(4, 6))
        optimizer = construct([p], config)
        for step in range(3):
            grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            p.grad = grad.T.contiguous().T if is_transposed else grad
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_another_shape_is_an_error(config):
    model = network()
    optimizer = construct(model.named_parameters(), config)
    train(model, optimizer, range(2))
    model[0].weight.data = torch.zeros(4, 8)
    model[0].weight.grad = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"'0.weight'.*\(4, 8\).*construct a new optimizer"):
        optimizer.step()


@pytest.mark.parametrize(
    "cut",
    [lambda w: w[:1], lambda w: w[:12], lambda w: w.view(8, 16), lambda w: w.view(-1)],
    ids=["a row", "rows", "other rows", "flat"],
)
def test_another_shape_of_the_same_memory_is_an_error(config, cut):
    model = network()
    optimizer = construct(model.named_parameters(), config)
    train(model, optimizer, range(2))
    before = [tensor.clone() for _, tensor in leaves(optimizer.state_dict()["state"])]
    model.zero_grad()
    model[0].weight.data = cut(model[0].weight.data)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ValueError, match=r"'0.weight' has now the shape"):
        optimizer.step()
    after = [tensor for _, tensor in leaves(optimizer.state_dict()["state"])]
    assert [*map(torch.equal, before, after)] == [True] * len(before)


def test_other_strides_of_the_same_memory(config):
    """Square and transposed in place: neither address nor shape tells."""
    results = []
    for is_copied in (False, True):
        p = torch.nn.Parameter(torch.arange(64.0).view(4, 4, 4).square())
        optimizer = construct([p], config)
        for dims in ((0, 1), (1, 2), (0, 2)):
            p.grad = p.detach().cos()
            optimizer.step()
            p.data = p.data.transpose(*dims)
            p.data = p.data.clone() if is_copied else p.data
        results.append(p.detach())
    assert torch.equal(*results)


def test_replaced_parameters_with_their_state(config):
    """What a tool does that wraps a model after the optimizer was built."""
    straight, model = network(), network()
    expected = construct(straight.parameters(), config)
    optimizer = construct(model.parameters(), config)
    train(straight, expected, range(2))
    train(model, optimizer, range(2))
    wrapped = copy.deepcopy(model)
    for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
        optimizer.state[q] = optimizer.state.pop(p)
    optimizer.param_groups[0]["params"] = list(wrapped.parameters())
    train(straight, expected, range(2, 5))
    train(wrapped, optimizer, range(2, 5))
    assert torch.equal(values(straight), values(wrapped))


def test_replaced_parameters_without_state_start_anew(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(4))
    fresh, model = network(seed=7), network(seed=7)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, range(3))
    train(fresh, construct(fresh.parameters(), config), range(3))
    assert torch.equal(values(model), values(fresh))


def test_parameters_in_another_order(config):
    straight, model = network(), network()
    expected = construct(straight.parameters(), config)
    optimizer = construct(model.parameters(), config)
    for start in (0, 3):
        train(straight, expected, range(start, start + 3))
        train(model, optimizer, range(start, start + 3))
        optimizer.param_groups[0]["params"].reverse()
    torch.testing.assert_close(values(straight), values(model), rtol=1e-5, atol=1e-6)


def test_a_dtensor_under_a_config_for_plain_tensors(config):
    from torch.distributed.tensor import DTensor

    p = torch.nn.Parameter(torch.zeros(4, 4))
    p.to_local = lambda: p  # what a DTensor is known by
    assert hasattr(DTensor, "to_local")
    with pytest.raises(ValueError, match=r"'weight'.*DTensor.*FullyShardDistributedConfig"):
        construct([("weight", p)], config)


def test_every_averaging_keeps_its_buffers(config):
    for averaging in (ds.ClassicMomentumConfig(), ds.ScheduleFreeConfig()):
        runs = []
        for is_moved in (False, True):
            model = network()
            optimizer = construct(model.parameters(), config, iterate_averaging_config=averaging)
            train(model, optimizer, range(3))
            if is_moved:
                swap_data(model)
                optimizer.eval()
                swap_data(model)
                optimizer.train()
            else:
                optimizer.eval()
                optimizer.train()
            train(model, optimizer, range(3, 6))
            runs.append(values(model))
        assert torch.equal(*runs)
