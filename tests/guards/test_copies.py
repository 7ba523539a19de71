"""Copies of an optimizer, and what it exports: plain values, read by tools that know nothing of it."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

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

AVERAGING = {
    "averaging": ds.ScheduleFreeConfig(),
    "momentum": ds.ClassicMomentumConfig(momentum=0.5),
}


def by_deepcopy(pair):
    return copy.deepcopy(pair)


def by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def by_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("make", [by_deepcopy, by_pickle, by_torch_save], ids=lambda f: f.__name__)
@pytest.mark.parametrize("averaging", [None, *AVERAGING])
def test_a_copy_goes_on_alike(config, make, averaging):
    model = network()
    settings = {} if averaging is None else {"iterate_averaging_config": AVERAGING[averaging]}
    optimizer = construct(model.named_parameters(), config, weight_decay=0.1, **settings)
    model[0].bias.requires_grad_(False)
    train(model, optimizer, range(3))
    model_copy, copied = make((model, optimizer))
    assert type(copied) is ds.DashShampoo
    assert copied.param_groups[0]["params"][0] is next(model_copy.parameters())
    assert_same_state(copied, optimizer)
    for m, o in ((model, optimizer), (model_copy, copied)):
        m[0].bias.requires_grad_(True)
        train(m, o, range(3, 6))
    assert torch.equal(values(model), values(model_copy))
    # They share nothing.
    train(model, optimizer, range(6, 7))
    assert not torch.equal(values(model), values(model_copy))


def tensors(tree):
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from tensors(value)


def to_shared_memory(optimizer):
    for tensor in tensors(optimizer.state_dict()["state"]):
        tensor.share_memory_()  # what a multiprocessing queue does to a tensor


def to_new_tensors(optimizer):
    def replace(tree):
        for key, value in tree.items():
            if isinstance(value, torch.Tensor):
                tree[key] = value.clone()
            elif isinstance(value, dict):
                replace(value)

    for tree in optimizer.state.values():
        replace(tree)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("move", [to_shared_memory, to_new_tensors], ids=lambda f: f.__name__)
@pytest.mark.parametrize("then", ["export", "load", "copy"])
def test_state_that_left_its_place_is_not_stale(config, move, then):
    model, straight = network(), network()
    optimizer, expected = (construct(m.parameters(), config) for m in (model, straight))
    for m, o in ((model, optimizer), (straight, expected)):
        train(m, o, range(3))
    move(optimizer)
    for m, o in ((model, optimizer), (straight, expected)):
        train(m, o, range(3, 6))
    if then == "load":
        optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    elif then == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    assert_same_state(optimizer, expected)
    for m, o in ((model, optimizer), (straight, expected)):
        train(m, o, range(6, 8))
    assert torch.equal(values(model), values(straight))
    assert_same_state(optimizer, expected)


def is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


@pytest.mark.parametrize("config", CONFIGS)
def test_exported_groups_hold_plain_values(config):
    optimizer = construct(network().named_parameters(), config)
    for group in optimizer.state_dict()["param_groups"]:
        assert {key for key, value in group.items() if not is_plain(value)} == set()
        assert isinstance(group["preconditioner_config"], str)
    # The groups themselves have the configs.
    assert optimizer.param_groups[0]["weight_decay_type"] is ds.WeightDecayType.DECOUPLED


@pytest.mark.parametrize("config", CONFIGS)
def test_groups_that_went_through_json(config):
    model = network()
    optimizer = construct(
        model.parameters(), config, iterate_averaging_config=AVERAGING["momentum"]
    )
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    groups = json.loads(json.dumps(state["param_groups"]))
    resumed = construct(
        model.parameters(), config, iterate_averaging_config=ds.ClassicMomentumConfig()
    )
    resumed.load_state_dict({"state": state["state"], "param_groups": groups})
    assert_same_state(resumed, optimizer)
    assert resumed.param_groups[0]["iterate_averaging_config"] == AVERAGING["momentum"]
    assert resumed.param_groups[0]["weight_decay_type"] is ds.WeightDecayType.DECOUPLED


def test_exported_configs_are_configs_again():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = construct([p], "dash")
    exported = optimizer.state_dict()["param_groups"][0]
    for again in (copy.deepcopy(exported), copy.copy(pickle.loads(pickle.dumps(exported)))):
        for key in ("preconditioner_config", "grafting_config", "weight_decay_type"):
            assert type(again[key]) is type(optimizer.param_groups[0][key])
            assert again[key] == optimizer.param_groups[0][key] == exported[key]
    assert exported["grafting_config"].epsilon == 1e-8
    assert isinstance(exported["grafting_config"], ds.AdamPreconditionerConfig)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {"cpu_offload": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
    ],
    ids=str,
)
def test_the_options_of_distributed_checkpoints(config, options):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    options = StateDictOptions(**options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    resumed_model = network()
    resumed_model.load_state_dict(model.state_dict())
    resumed = construct(resumed_model.parameters(), config)
    set_optimizer_state_dict(resumed_model, resumed, state, options=options)
    assert_same_state(resumed, optimizer)


def test_a_checkpoint_is_read_weights_only_without_a_line_from_the_user(tmp_path):
    settings = dict(
        iterate_averaging_config=ds.ScheduleFreeConfig(), weight_decay_type=ds.WeightDecayType.L2
    )
    for config in CONFIGS:
        model = network()
        optimizer = construct(model.parameters(), config, **settings)
        train(model, optimizer, range(2))
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / config
        )
        saved = torch.load(tmp_path / config, weights_only=True)
        resumed = construct(model.parameters(), config, **settings)
        resumed.load_state_dict(saved["optimizer"])
        assert_same_state(resumed, optimizer)
    script = """
        import sys, torch
        import dash_shampoo as ds
        saved = torch.load(sys.argv[1], weights_only=True)
        params = [torch.nn.Parameter(p) for p in saved["model"].values()]
        group = saved["optimizer"]["param_groups"][0]
        print(type(group["preconditioner_config"]).__name__, len(saved["optimizer"]["state"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "dash"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["DashShampooPreconditionerConfig", "4"]


def test_an_import_from_a_bare_checkout(tmp_path):
    """Without the package's metadata, as with PYTHONPATH on a checkout."""
    root = Path(ds.__file__).parents[1]
    (tmp_path / "dash_shampoo").symlink_to(root / "dash_shampoo")
    torch_home = Path(torch.__file__).parents[1]
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import importlib.metadata as metadata
        def version(name):
            raise metadata.PackageNotFoundError(name)
        metadata.version = version
        import dash_shampoo
        print(dash_shampoo.__version__)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(torch_home), "DASH_SHAMPOO_BASE": "embedded"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0+checkout"


@pytest.mark.parametrize("config", CONFIGS)
def test_an_export_is_a_view_of_the_state(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    state = dict(leaves(optimizer.state_dict()["state"]))
    train(model, optimizer, range(2))
    again = dict(leaves(optimizer.state_dict()["state"]))
    assert all(value.data_ptr() == again[key].data_ptr() for key, value in state.items())


def test_a_grad_scaler():
    model = network()
    optimizer = construct(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.full((2, 8), float(step))).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    before = values(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(before, values(model))
