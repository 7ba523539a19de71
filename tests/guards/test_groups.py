"""Parameter groups: added late, empty, frozen, thawed, on two devices."""

from __future__ import annotations

import logging

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


def num_bytes(state):
    return sum(value.numel() * value.element_size() for _, value in leaves(state))


def test_a_group_that_is_added_after_steps(config):
    """What a fine-tuning callback does. The others' state is untouched, the new one's starts at 0."""
    model = network()
    optimizer = construct([{"params": model[2].parameters()}], config)
    model[0].requires_grad_(False)
    train(model, optimizer, range(3))
    before = dict(leaves(optimizer.state_dict()["state"]))
    before = {key: value.clone() for key, value in before.items()}
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.001})
    after = dict(leaves(optimizer.state_dict()["state"]))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert len(after) > len(before)
    weights = values(model[0])
    train(model, optimizer, range(3, 6))
    assert not torch.equal(weights, values(model[0]))
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [3, 3, 6, 6]
    resumed = construct(
        [{"params": model[2].parameters()}, {"params": model[0].parameters()}], config
    )
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(resumed, optimizer)


def test_a_group_that_is_added_before_the_first_step(config):
    together, apart = network(), network()
    one = construct([{"params": m.parameters()} for m in (together[0], together[2])], config)
    other = construct([{"params": apart[0].parameters()}], config)
    other.add_param_group({"params": apart[2].parameters()})
    train(together, one, range(3))
    train(apart, other, range(3))
    assert torch.equal(values(together), values(apart))


def test_a_group_that_cannot_be_added_leaves_no_trace(config):
    model, straight = network(), network()
    optimizer, expected = (construct(m.parameters(), config) for m in (model, straight))
    train(model, optimizer, range(2))
    train(straight, expected, range(2))
    odd = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    good = torch.nn.Parameter(torch.zeros(2, 2))
    for group in (
        {"params": [odd]},
        {"params": [good], "lr": -1.0},
        {"params": [good], "betas": 3},
        {"params": list(model.parameters())},
    ):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(2, 4))
    train(straight, expected, range(2, 4))
    assert torch.equal(values(model), values(straight))


def test_empty_groups(config):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    biases = [p for p in model.parameters() if p.dim() < 2]
    optimizer = construct(
        [{"params": biases}, {"params": model.parameters()}, {"params": []}], config
    )
    train(model, optimizer, range(3))
    resumed = construct([{"params": []}, {"params": model.parameters()}, {"params": []}], config)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_state(resumed, optimizer)
    assert resumed.param_groups[0]["start_preconditioning_step"] == 1
    assert resumed.param_groups[0]["beta3"] == 0.9


def test_nothing_but_empty_groups(config):
    optimizer = construct([{"params": []}], config)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(p.detach(), torch.ones(2, 2))


def test_generators_and_named_parameters(config):
    by_list, by_generator, by_name = network(), network(), network()
    optimizers = [
        construct(list(by_list.parameters()), config),
        construct((p for p in by_generator.parameters()), config),
        construct(by_name.named_parameters(), config),
    ]
    for model, optimizer in zip((by_list, by_generator, by_name), optimizers, strict=True):
        train(model, optimizer, range(3))
    assert torch.equal(values(by_list), values(by_generator))
    assert torch.equal(values(by_list), values(by_name))
    assert optimizers[2].param_groups[0]["param_names"][0] == "0.weight"
    assert optimizers[2].state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_frozen_parameters_have_no_state(config, caplog):
    big = torch.nn.Linear(256, 256, bias=False).requires_grad_(False)
    model = torch.nn.Sequential(big, torch.nn.Linear(256, 4))
    with caplog.at_level(logging.INFO, "dash_shampoo"):
        optimizer = construct(model.parameters(), config)
    assert "1 frozen parameters with 65536 elements have no state" in caplog.text
    model(torch.ones(2, 256)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert sorted(state) == [0, 1, 2]
    assert state[0] == {}
    assert big.weight not in optimizer.state
    assert num_bytes(state) > 0


def test_everything_frozen(config):
    model = network().requires_grad_(False)
    optimizer = construct(model.parameters(), config)
    with pytest.warns(UserWarning, match="No parameter has a gradient.*or frozen"):
        optimizer.step()
    model[2].requires_grad_(True)
    before = values(model)
    train(model, optimizer, range(2))
    assert torch.equal(before[:144], values(model)[:144])
    assert not torch.equal(before[144:], values(model)[144:])


def test_a_thawed_parameter_starts_its_own_bias_correction(config):
    """Its updates are those of an optimizer that is made when it is thawed."""
    model, alone = network(), network()
    model[0].requires_grad_(False)
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(5))
    alone.load_state_dict(model.state_dict())
    fresh = construct(alone[0].parameters(), config)
    model[0].requires_grad_(True)
    grads = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        for p in alone[0].parameters()
    ]
    for _ in range(3):
        for m in (model, alone):
            for p, grad in zip(m[0].parameters(), grads, strict=True):
                p.grad = grad.clone()
        optimizer.step()
        fresh.step()
    assert torch.equal(values(model[0]), values(alone[0]))


def test_a_first_gradient_that_comes_late(config):
    """The size of a first update does not depend on how long the others have trained."""
    sizes = []
    for warm in (0, 60):
        torch.manual_seed(0)
        a, b = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        grafting = ds.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)
        optimizer = construct([a, b], config, betas=(0.9, 0.999), grafting_config=grafting)
        for step in range(warm):
            a.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            if step == 30:  # a resume in between changes nothing
                optimizer.load_state_dict(optimizer.state_dict())
        a.grad, b.grad = torch.zeros(8, 8), torch.ones(8, 8)
        before = b.detach().clone()
        optimizer.step()
        sizes.append((b.detach() - before).norm())
    torch.testing.assert_close(sizes[0], sizes[1])


def test_a_parameter_that_is_frozen_again_keeps_its_state(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    model[0].requires_grad_(False)
    before = values(model)
    train(model, optimizer, range(3, 5))
    assert torch.equal(before[:144], values(model)[:144])
    assert int(optimizer.state[model[0].weight]["step"]) == 5
    model[0].requires_grad_(True)
    train(model, optimizer, range(5, 7))
    assert not torch.equal(before[:144], values(model)[:144])


def test_a_checkpoint_from_before_a_thaw(config):
    model = network()
    model[0].requires_grad_(False)
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    thawed = network()
    resumed = construct(thawed.parameters(), config)
    resumed.load_state_dict(saved)
    assert [p in resumed.state for p in thawed.parameters()] == [False, False, True, True]
    train(thawed, resumed, range(2))
    assert [int(resumed.state[p]["step"]) for p in thawed.parameters()] == [2, 2, 5, 5]
    # And back: state for what is frozen here is taken over, so that it is not lost.
    again = construct(model.parameters(), config)
    again.load_state_dict(resumed.state_dict())
    assert_same_state(again, resumed)


def test_hooks_of_the_user_see_his_groups(config):
    model = network()
    model[0].requires_grad_(False)
    optimizer = construct(model.parameters(), config)
    seen = []
    optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(("pre", len(o.param_groups[0]["params"])))
    )
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", len(o.state))))
    train(model, optimizer, range(1))
    assert seen == [("pre", 4), ("post", 2)]
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("state_dict"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(sorted(state)))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert seen[2:] == ["state_dict", ["mine", "param_groups", "state"], "loaded"]
    # Hooks outlive a reconstruction.
    model[0].requires_grad_(True)
    train(model, optimizer, range(1, 2))
    assert seen[-2:] == [("pre", 4), ("post", 4)]


def test_the_printed_form_fits_a_screen(config):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4, 4))]} for _ in range(40)]
    text = repr(construct(groups, config))
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 110
    assert "and 30 more" in text
    assert "lr=0.01, betas=(0.9, 0.95)" in text
