"""Checkpoints go over from Meta's package to DashShampoo and back, on either base."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import dash_shampoo as ds
from dash_shampoo.base import embedded

meta = pytest.importorskip("distributed_shampoo", reason="Meta's package is not importable")
META = SimpleNamespace(
    **{name: getattr(meta, name) for name in meta.__all__},
    ClassicMomentumConfig=meta.shampoo_types.ClassicMomentumConfig,
)
EMBEDDED = SimpleNamespace(**vars(embedded))

SHAPES = [(8, 8), (20, 13), (5,), (), (3, 4, 5), (8, 8)]


def settings(ns):
    return {
        "lr": 0.05,
        "betas": (0.9, 0.95),
        "epsilon": 1e-6,
        "max_preconditioner_dim": 8,
        "precondition_frequency": 2,
        "weight_decay": 0.01,
        "weight_decay_type": ns.WeightDecayType.CORRECTED,
        "grafting_config": ns.AdamPreconditionerConfig(beta2=0.95),
        "iterate_averaging_config": ns.ScheduleFreeConfig(),
        "preconditioner_config": ns.RootInvShampooPreconditionerConfig(
            factor_matrix_dtype=torch.float64, inv_factor_matrix_dtype=torch.float64
        ),
    }


class Model(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, shape in enumerate(SHAPES):
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{index}", torch.nn.Parameter(value))


class Run:
    """A model with an optimizer, that trains on gradients given by the number of the step."""

    def __init__(self, ns, optimizer_class, dtype=torch.float64):
        self.model = Model(dtype)
        params = list(self.model.parameters())
        groups = [{"params": params[:4]}, {"params": params[4:], "lr": 0.02}]
        self.optimizer = optimizer_class(groups, **settings(ns))

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            self.optimizer.step()
        return self

    def resume(self, other, state_dict):
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(state_dict)
        return self


def theirs(dtype=torch.float64):
    return Run(META, meta.DistributedShampoo, dtype)


def ours(dtype=torch.float64):
    return Run(ds, ds.DashShampoo, dtype)


def through_a_file(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_parameters(one, two):
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def leaves(state, path=()):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def test_keys_shapes_and_dtypes_are_those_of_meta():
    expected = theirs(torch.bfloat16).train(0, 3).optimizer.state_dict()
    found = ours(torch.bfloat16).train(0, 3).optimizer.state_dict()
    mine, others = dict(leaves(found["state"])), dict(leaves(expected["state"]))
    assert mine.keys() == others.keys()
    assert len(mine) > 50
    for key, value in others.items():
        assert (mine[key].shape, mine[key].dtype) == (value.shape, value.dtype), key
    for one, two in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert one.keys() == two.keys()
        assert {k: type(v).__name__ for k, v in one.items()} == {
            k: type(v).__name__ for k, v in two.items()
        }


def test_from_meta_to_dash_shampoo_and_back():
    straight = theirs().train(0, 12)
    first = theirs().train(0, 4)
    second = ours().resume(first, through_a_file(first.optimizer)).train(4, 8)
    saved = through_a_file(second.optimizer)
    if ds.base.name == "embedded":
        # The file was read as configs of the embedded base; Meta's optimizer gets its own.
        for group, now in zip(saved["param_groups"], first.optimizer.param_groups, strict=True):
            group |= {key: value for key, value in now.items() if key.endswith(("config", "type"))}
    third = theirs().resume(second, saved).train(8, 12)
    assert_same_parameters(third, straight)


@pytest.mark.skipif(ds.base.name != "meta", reason="Meta's classes are wanted from the file")
def test_from_the_embedded_base_to_meta():
    straight = theirs().train(0, 8)
    first = Run(EMBEDDED, embedded.DistributedShampoo).train(0, 4)
    second = theirs().resume(first, through_a_file(first.optimizer)).train(4, 8)
    assert_same_parameters(second, straight)
    config = second.optimizer.param_groups[0]["iterate_averaging_config"]
    assert type(config) is meta.ScheduleFreeConfig


def test_configs_of_the_other_base_are_understood():
    """As they come from a file that was read without restricting classes."""
    other = (EMBEDDED, embedded.DistributedShampoo)
    if ds.base.name == "embedded":
        other = (META, meta.DistributedShampoo)
    straight = theirs().train(0, 8)
    first = Run(*other).train(0, 4)
    second = ours().resume(first, first.optimizer.state_dict()).train(4, 8)
    assert_same_parameters(second, straight)
    for group in second.optimizer.param_groups:
        assert type(group["iterate_averaging_config"]) is ds.ScheduleFreeConfig
        assert group["weight_decay_type"] is ds.WeightDecayType.CORRECTED


def test_factors_of_bf16_parameters_keep_their_bits():
    first = theirs(torch.bfloat16).train(0, 4)
    second = ours(torch.bfloat16).resume(first, through_a_file(first.optimizer))
    expected = dict(leaves(first.optimizer.state_dict()["state"]))
    found = dict(leaves(second.optimizer.state_dict()["state"]))
    assert any(value.dtype == torch.float64 for value in expected.values())
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("with_configs", [True, False])
def test_through_a_distributed_checkpoint(with_configs, tmp_path):
    def state_of(run):
        state = get_optimizer_state_dict(run.model, run.optimizer)
        if not with_configs:
            for group in state["param_groups"]:
                for key in [k for k in group if k.endswith(("_config", "_type"))]:
                    del group[key]
        return {"optim": state}

    straight = theirs().train(0, 12)
    first = theirs().train(0, 4)
    dcp.save(state_of(first), checkpoint_id=tmp_path / "first", no_dist=True)
    second = ours()
    second.model.load_state_dict(first.model.state_dict())
    loaded = state_of(second)
    dcp.load(loaded, checkpoint_id=tmp_path / "first", no_dist=True)
    set_optimizer_state_dict(second.model, second.optimizer, loaded["optim"])
    second.train(4, 8)
    # Back, where the groups are whole and of Meta's classes.
    if with_configs and ds.base.name == "meta":
        dcp.save(state_of(second), checkpoint_id=tmp_path / "second", no_dist=True)
        third = theirs()
        third.model.load_state_dict(second.model.state_dict())
        loaded = state_of(third)
        dcp.load(loaded, checkpoint_id=tmp_path / "second", no_dist=True)
        set_optimizer_state_dict(third.model, third.optimizer, loaded["optim"])
        second = third
    assert_same_parameters(second.train(8, 12), straight)


def test_where_meta_is_not_installed(tmp_path):
    straight = theirs().train(0, 8)
    first = theirs().train(0, 4)
    torch.save([first.model.state_dict(), first.optimizer.state_dict()], tmp_path / "meta.pt")
    script = """
        import sys
        sys.modules["distributed_shampoo"] = None  # importing it fails
        import torch
        import dash_shampoo as ds

        assert ds.base.name == "embedded"
        source, target = sys.argv[1:]
        model, state = torch.load(source, weights_only=True)
        params = [torch.nn.Parameter(p) for p in model.values()]
        optimizer = ds.DashShampoo(
            [{"params": params[:4]}, {"params": params[4:]}],
            **{k: v for k, v in state["param_groups"][0].items() if k not in ("params", "peak_lr")},
        )
        optimizer.load_state_dict(state)
        for step in range(4, 8):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        torch.save([p.detach() for p in params], target)
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "meta.pt", tmp_path / "out.pt"],
        env={**os.environ, "DASH_SHAMPOO_BASE": "auto", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found = torch.load(tmp_path / "out.pt")
    for p, q in zip(found, straight.model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-10, atol=1e-12)
