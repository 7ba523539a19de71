"""Options that change between steps, by hand, by a scheduler or by a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.base import SHAMPOO_PRECONDITIONER_LIST
from tests.guards.common import CONFIGS, construct, network, train, values

pytestmark = pytest.mark.parametrize("config", CONFIGS)


def run(config, edit=None, **settings):
    model = network()
    optimizer = construct(model.parameters(), config, **settings)
    train(model, optimizer, range(4))
    if edit is not None:
        for group in optimizer.param_groups:
            group.update(edit)
    train(model, optimizer, range(4, 8))
    return values(model), optimizer


@pytest.mark.parametrize(
    "edit",
    [
        {"betas": (0.9, 0.5)},
        {"betas": (0.5, 0.95)},
        {"beta3": 0.1},
        {"epsilon": 1e-2},
        {"weight_decay": 0.3},
        {"use_bias_correction": False},
        {"precondition_frequency": 3},
        {"max_preconditioner_dim": 2048},
        {"grafting_config": ds.AdamPreconditionerConfig(beta2=0.5, epsilon=1e-8)},
    ],
    ids=lambda edit: next(iter(edit)) if isinstance(edit, dict) else None,
)
def test_an_edit_is_obeyed(config, edit):
    plain, _ = run(config)
    edited, optimizer = run(config, edit)
    name = next(iter(edit))
    assert optimizer.param_groups[0][name] == edit[name]
    # Blocks are no larger than 16 here, so that this one changes nothing.
    assert torch.equal(plain, edited) == (name == "max_preconditioner_dim")


def test_beta2_and_epsilon_reach_the_preconditioner(config):
    _, optimizer = run(config, {"betas": (0.9, 0.5), "epsilon": 1e-3})
    for lists in optimizer._per_group_state_lists:
        preconditioners = lists[SHAMPOO_PRECONDITIONER_LIST]
        assert (preconditioners._beta2, preconditioners._epsilon) == (0.5, 1e-3)
        assert preconditioners._weighting_factor == 0.5


def test_an_edit_is_what_a_construction_gives(config):
    """With no history in the state (the first step), both are the same."""
    built, edited = network(), network()
    one = construct(built.parameters(), config, betas=(0.8, 0.7), epsilon=1e-3)
    other = construct(edited.parameters(), config)
    other.param_groups[0] |= {"betas": (0.8, 0.7), "epsilon": 1e-3, "beta3": 0.8}
    train(built, one, range(3))
    train(edited, other, range(3))
    assert torch.equal(values(built), values(edited))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"max_preconditioner_dim": 4}, "max_preconditioner_dim.*was edited"),
        ({"grafting_config": None}, "grafting_config.*was edited"),
        ({"row_parts": 2}, "row_parts of parameter group 0 was edited"),
        ({"row_parts": 3}, "row_parts=3 for a parameter of 16 rows"),
        ({"row_parts": "2"}, "row_parts of parameter group 0='2'"),
        ({"iterate_averaging_config": ds.ClassicMomentumConfig()}, "iterate_averaging_config"),
        ({"betas": (0.9, 1.5)}, r"betas\[1\] of parameter group 0=1.5"),
        ({"betas": 0.9}, "betas of parameter group 0=0.9"),
        ({"epsilon": -1.0}, "epsilon of parameter group 0=-1.0"),
        ({"lr": float("nan")}, "lr of parameter group 0=nan"),
        ({"lr": "fast"}, "lr of parameter group 0='fast'"),
        ({"precondition_frequency": 0}, "precondition_frequency of parameter group 0=0"),
        ({"weight_decay_type": "L2"}, "weight_decay_type of parameter group 0='L2'"),
    ],
    ids=str,
)
def test_an_edit_that_cannot_be_obeyed_is_refused_until_it_is_undone(config, edit, message):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(2))
    group = optimizer.param_groups[0]
    before, kept = values(model), {key: group.get(key) for key in edit}
    group.update(edit)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step()
    assert torch.equal(before, values(model))
    group.update(kept)
    train(model, optimizer, range(2, 4))
    assert torch.equal(values(model), run_of(config, 4))


def test_row_parts_that_are_said_otherwise_change_nothing(config):
    results = []
    for edit in ({}, {"row_parts": (8, 8)}):
        p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 128).view(16, 8).clone())
        optimizer = construct([{"params": [p], "row_parts": 2}], config)
        for step in range(4):
            if step == 2:
                optimizer.param_groups[0] |= edit
            p.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        assert len(optimizer.state_dict()["state"][0]) == 3  # two blocks and the step
        results.append(p.detach().clone())
    assert torch.equal(*results)


def run_of(config, steps):
    model = network()
    train(model, construct(model.parameters(), config), range(steps))
    return values(model)


def test_beta1_from_zero(config):
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = construct([p], config, betas=(0.0, 0.9))
    optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    with pytest.raises(ValueError, match=r"betas\[0\] can't change from 0"):
        optimizer.step()


def test_beta1_to_zero_and_back_with_fewer_gradients_in_between(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(2))
    group = optimizer.param_groups[0]
    group["betas"] = (0.0, 0.95)
    for p in list(model.parameters())[1:]:
        p.grad = None
    optimizer.step()
    group["betas"] = (0.9, 0.95)
    optimizer.step()
    train(model, optimizer, range(3, 5))
    assert torch.isfinite(values(model)).all()


def test_beta3_follows_beta1(config):
    """beta3=-1 means beta1, where a scheduler cycles that too; an explicit beta3 stays."""
    results = []
    for beta3, is_set in ((-1.0, False), (-1.0, True), (0.9, False)):
        model = network()
        optimizer = construct(model.parameters(), config, lr=0.001, beta3=beta3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=12)
        for step in range(11):
            if is_set:
                optimizer.param_groups[0]["beta3"] = optimizer.param_groups[0]["betas"][0]
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
        results.append(values(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("what", ["memory", "parameters", "groups"])
def test_an_edit_beside_another_change_is_obeyed(config, what):
    """Betas edited, and before the next step the blocks cut anew for another reason."""
    results = []
    for is_changed in (False, True):
        model = network()
        optimizer = construct(model.parameters(), config, beta3=-1.0)
        train(model, optimizer, range(3))
        optimizer.param_groups[0]["betas"] = (0.5, 0.7)
        if is_changed and what == "memory":
            for p in model.parameters():
                p.data = p.data.clone()
        elif is_changed and what == "parameters":
            optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(2)))
        elif is_changed:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        train(model, optimizer, range(3, 6))
        assert optimizer.param_groups[0]["beta3"] == 0.5
        results.append(values(model))
    assert torch.equal(*results)


def test_beta3_follows_beta1_after_a_resume(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(2))
    resumed_model = copy.deepcopy(model)
    resumed = construct(resumed_model.parameters(), config, betas=(0.5, 0.9))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, resumed):
        o.param_groups[0]["betas"] = (0.8, 0.95)
    train(model, optimizer, range(2, 5))
    train(resumed_model, resumed, range(2, 5))
    assert torch.equal(values(model), values(resumed_model))
    assert resumed.param_groups[0]["beta3"] == 0.8


def test_the_peak_of_a_group_with_its_own_lr(config):
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = construct(
        groups,
        config,
        lr=0.001,
        weight_decay=0.1,
        weight_decay_type=ds.WeightDecayType.CORRECTED,
    )
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.1, 0.001]
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1 * 0.1))


def test_an_explicit_peak_wins(config):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = construct([{"params": [p], "lr": 0.1, "peak_lr": 0.5}], config)
    assert optimizer.param_groups[0]["peak_lr"] == 0.5


def test_a_warm_up_from_zero(config):
    model = network()
    optimizer = construct(
        model.parameters(), config, weight_decay=0.1, weight_decay_type=ds.WeightDecayType.CORRECTED
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
    assert optimizer.param_groups[0]["lr"] == 0.0
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["peak_lr"] == 0.01
    assert torch.isfinite(values(model)).all()


def test_a_scheduler_that_looks_at_the_loss(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        train(model, optimizer, range(1))
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.01


def test_a_learning_rate_that_is_a_tensor(config):
    models = network(), network()
    optimizers = [
        construct(m.parameters(), config, lr=lr)
        for m, lr in zip(models, (0.25, torch.tensor(0.25)), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3))
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(3, 5))
    assert torch.equal(values(models[0]), values(models[1]))


def test_a_checkpoint_after_a_scheduler_s_step_goes_on_to_follow_beta1(config):
    """`optimizer.step(); scheduler.step(); save`: beta1 is edited between the step and the checkpoint."""
    first = construct(network().parameters(), config, betas=(0.9, 0.95))
    first.param_groups[0]["betas"] = (0.8, 0.95)
    saved = first.state_dict()
    assert saved["param_groups"][0]["beta3"] == 0.8
    resumed = construct(network().parameters(), config, betas=(0.9, 0.95))
    resumed.load_state_dict(saved)
    resumed.param_groups[0]["betas"] = (0.5, 0.95)
    assert resumed.state_dict()["param_groups"][0]["beta3"] == 0.5
