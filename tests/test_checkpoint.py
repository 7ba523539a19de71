"""Saving and resuming: weights-only files, distributed checkpoints, hooks, and full precision."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import dash_shampoo as ds


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 5, bias=False)).to(dtype)


def construct(network, optimizer_class=ds.DashShampoo, **settings):
    settings = {
        "lr": 0.05,
        "betas": (0.9, 0.95),
        "epsilon": 1e-6,
        "max_preconditioner_dim": 8,
        "precondition_frequency": 2,
        "grafting_config": ds.AdamPreconditionerConfig(),
        "iterate_averaging_config": ds.ScheduleFreeConfig(),
        "weight_decay": 0.01,
        "weight_decay_type": ds.WeightDecayType.CORRECTED,
    } | settings
    return optimizer_class(network.parameters(), **settings)


def train(network, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def tensors(state, path=()):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from tensors(value, (*path, str(key)))
        elif isinstance(value, torch.Tensor):
            yield (*path, str(key)), value


def assert_same_state(one, two):
    found, expected = dict(tensors(one["state"])), dict(tensors(two["state"]))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_config_can_be_loaded_weights_only():
    configs = [
        ds.DashShampooPreconditionerConfig(
            amortized_computation_config=ds.EigenConfig(
                rank_deficient_stability_config=ds.SpectrumRepairConfig(method="abs")
            ),
            safety=ds.SafetyConfig(),
        ),
        ds.NewtonDBConfig(scaling=ds.PowerIterationScaling()),
        ds.ChebyshevConfig(),
        ds.ScaledCoupledNewtonConfig(),
        ds.CoupledHigherOrderConfig(rel_epsilon=1e-3, abs_epsilon=0.0),
        ds.CoupledNewtonConfig(),
        ds.OrthogonalIterationConfig(num_iterations=2),
        ds.MuonOrthogonalizationConfig(scale_by_dims_fn=ds.muon_original),
        ds.MinimaxPolarConfig(num_iterations=6),
        ds.GramOrthogonalizationConfig(),
        ds.PseudoInverseConfig(),
        ds.DDPDistributedConfig(),
        ds.FSDPParamAssignmentStrategy.REPLICATE,
        ds.WeightDecayType.L2,
        ds.ClassicMomentumConfig(momentum=0.5),
        ds.GeneralizedPrimalAveragingConfig(eval_interp_coeff=0.8, train_interp_coeff=0.7),
    ]
    assert through_a_file(configs) == configs


def test_every_public_config_class_is_safe():
    listed = {entry[0] if isinstance(entry, tuple) else entry for entry in ds.safe_globals()}
    public = [getattr(ds, name) for name in ds.__all__ if name.endswith(("Config", "Scaling"))]
    classes = {value for value in public if isinstance(value, type)}
    assert len(classes) > 40
    # Arguments of torch.compile are not in a checkpoint.
    assert classes - listed <= {ds.ShampooPT2CompileConfig}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_is_exact(dtype):
    network = model(dtype)
    optimizer = construct(network)
    train(network, optimizer, range(5))
    saved = through_a_file(optimizer.state_dict())
    resumed_network = copy.deepcopy(network)
    resumed = construct(resumed_network)
    train(resumed_network, construct(resumed_network), range(1))  # so that nothing fits by chance
    resumed_network.load_state_dict(network.state_dict())
    resumed.load_state_dict(saved)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())

    train(network, optimizer, range(5, 9))
    train(resumed_network, resumed, range(5, 9))
    for p, q in zip(resumed_network.parameters(), network.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_mode_survives_a_load():
    network = model(torch.bfloat16)
    optimizer = construct(network)
    train(network, optimizer, range(3))
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    optimizer.load_state_dict(saved)
    train(network, optimizer, range(3, 5))  # raises in eval mode


def test_a_load_calls_setstate_as_torch_does():
    class Listening(ds.DashShampoo):
        heard = None

        def __setstate__(self, state):
            super().__setstate__(state)
            if "_arguments" not in state:
                self.heard = state

    model = torch.nn.Linear(4, 3)
    optimizer = Listening(model.parameters(), lr=0.25)
    optimizer.load_state_dict(ds.DashShampoo(model.parameters(), lr=0.5).state_dict())
    assert optimizer.heard["param_groups"] is optimizer.param_groups
    assert set(optimizer.heard["state"]) == set(model.parameters())
    assert optimizer.heard["param_groups"][0]["lr"] == 0.5


def test_an_entry_that_is_no_tensor_is_refused():
    network = model(torch.float32)
    optimizer = construct(network)
    train(network, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    saved["state"][0]["block_0"]["note"] = "mine"
    with pytest.raises(ValueError, match=r"block_0\.note is no tensor .parameter"):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), before)


def test_hooks_of_others_come_first():
    network = model(torch.bfloat16)
    optimizer = construct(network)
    train(network, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    doubled = copy.deepcopy(saved)
    for key, value in tensors(doubled["state"]):
        if "factor_matrices" in key:
            value.mul_(2)
    optimizer.register_load_state_dict_pre_hook(lambda *_: doubled)
    optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), doubled)
    num_hooks = len(optimizer._optimizer_load_state_dict_pre_hooks)
    optimizer.load_state_dict(saved)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == num_hooks


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_of_one_process(flatten, dtype, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    network = model(dtype)
    optimizer = construct(network)
    train(network, optimizer, range(5))
    dcp.save(
        {"optim": get_optimizer_state_dict(network, optimizer, options=options)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )

    resumed_network = copy.deepcopy(network)
    resumed = construct(resumed_network)
    loaded = {"optim": get_optimizer_state_dict(resumed_network, resumed, options=options)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(resumed_network, resumed, loaded["optim"], options=options)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())

    train(network, optimizer, range(5, 9))
    train(resumed_network, resumed, range(5, 9))
    for p, q in zip(resumed_network.parameters(), network.parameters(), strict=True):
        assert torch.equal(p, q)
