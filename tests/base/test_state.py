"""State dicts of the embedded base: keys, loading all or nothing, in place, without rounding."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import dash_shampoo.base.embedded as embedded
from tests.base.cases import SHAPES, flatten, gradients, parameters, take_steps

OPTIONS = {
    "grafting_config": embedded.AdamPreconditionerConfig(),
    "iterate_averaging_config": embedded.ScheduleFreeConfig(),
    "max_preconditioner_dim": 8,
    "precondition_frequency": 2,
}


def build(dtype=torch.float64, shapes=SHAPES, **options):
    params = parameters(dtype, shapes)
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.1}]
    return params, embedded.DistributedShampoo(groups, **{**OPTIONS, **options})


def trained(num_steps=3, dtype=torch.float64, **options):
    params, optimizer = build(dtype, **options)
    take_steps(optimizer, params, gradients(num_steps, dtype=dtype))
    return params, optimizer


def snapshot(optimizer):
    state = {key: value.clone() for key, value in flatten(optimizer.state_dict()["state"])}
    return state, copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])


def assert_unchanged(optimizer, before):
    after = snapshot(optimizer)
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


def test_keys_shapes_and_dtypes():
    param = torch.nn.Parameter(torch.randn(12, 3, dtype=torch.bfloat16))
    optimizer = embedded.DistributedShampoo(
        [param], **{**OPTIONS, "iterate_averaging_config": embedded.ClassicMomentumConfig()}
    )
    found = {
        key: (tuple(v.shape), v.dtype) for key, v in flatten(optimizer.state_dict()["state"][0])
    }
    expected = {("step",): ((), torch.int64)}
    for block, rows in (("block_0", 8), ("block_1", 4)):
        for name in ("factor_matrices", "inv_factor_matrices"):
            for number, size in enumerate((rows, 3)):
                shape = (size * (size + 1) // 2,)
                expected[block, "shampoo", name, number] = (shape, torch.float32)
        for name in ("adagrad", "filtered_grad", "momentum_buffer"):
            expected[block, name] = ((rows, 3), torch.bfloat16)
    assert found == expected


def test_scalars_are_shared_by_the_parameters_of_a_group():
    _, optimizer = build()
    state = optimizer.state_dict()["state"]
    for key in ("step", "lr_sum", "train_mode"):
        assert state[0][key] is state[2][key]
        assert state[0][key] is not state[3][key]


@pytest.mark.parametrize("how", ["pickle", "weights_only", "deepcopy"])
def test_resuming_equals_not_stopping(how):
    steps = gradients(8, "changing")
    expected, uninterrupted = build()
    take_steps(uninterrupted, expected, steps)

    params, optimizer = build()
    take_steps(optimizer, params, steps[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    if how != "deepcopy":
        # Hyper-parameters are config objects; the tensors need nothing but torch to be read.
        groups = saved.pop("param_groups") if how == "weights_only" else None
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=how == "weights_only")
        saved.setdefault("param_groups", groups)
    successors, successor = build()
    with torch.no_grad():
        for new, old in zip(successors, params, strict=True):
            new.copy_(old)
    successor.load_state_dict(saved)
    take_steps(successor, successors, steps[4:])
    assert all(torch.equal(p, q) for p, q in zip(successors, expected, strict=True))


def test_loading_keeps_the_tensors_and_views_of_stacks():
    _, source = trained()
    _, optimizer = build()
    lists = optimizer._per_group_state_lists[1]["shampoo_preconditioner_list"]
    factor = lists._local_kronecker_factors_unwrapped[0].factor_matrices[0]
    stack = torch.zeros(4, *factor.shape, dtype=factor.dtype)
    with torch.no_grad():
        factor.set_(stack.untyped_storage(), factor.numel() * 2, factor.shape, factor.stride())
    before = {key: value.data_ptr() for key, value in flatten(optimizer.state_dict()["state"])}
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    after = {key: value.data_ptr() for key, value in flatten(optimizer.state_dict()["state"])}
    assert before == after
    expected = source.state_dict()["state"][3]["block_0"]["shampoo"]["factor_matrices"][0]
    assert torch.equal(stack[2], expected)
    assert expected.any()


def test_fp32_state_of_bf16_parameters_is_not_rounded():
    _, source = trained(dtype=torch.bfloat16)
    _, optimizer = build(torch.bfloat16)
    saved = copy.deepcopy(source.state_dict())
    optimizer.load_state_dict(saved)
    for key, value in flatten(optimizer.state_dict()["state"]):
        expected = dict(flatten(source.state_dict()["state"]))[key]
        assert torch.equal(value, expected), key
    factor = optimizer.state_dict()["state"][4]["block_0"]["shampoo"]["factor_matrices"][0]
    assert factor.dtype == torch.float32
    assert not torch.equal(factor, factor.bfloat16().float())


def test_the_exported_dicts_are_the_callers():
    _, optimizer = build()
    optimizer.state_dict()["state"][4]["block_0"].clear()
    assert optimizer.state_dict()["state"][4]["block_0"]


def test_keys_that_became_strings_are_understood():
    _, source = trained()
    _, optimizer = build()
    saved = copy.deepcopy(source.state_dict())
    for param_state in saved["state"].values():
        for block in param_state.values():
            if isinstance(block, dict):
                for name, matrices in block["shampoo"].items():
                    block["shampoo"][name] = {str(k): v for k, v in matrices.items()}
    optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, snapshot(source))


WRONG = {
    "another block size": lambda: trained(max_preconditioner_dim=5)[1],
    "no grafting": lambda: trained(grafting_config=None)[1],
    "no filtered gradient": lambda: trained(betas=(0.0, 1.0))[1],
    "momentum": lambda: trained(iterate_averaging_config=embedded.ClassicMomentumConfig())[1],
    "unpacked": lambda: trained(
        preconditioner_config=embedded.RootInvShampooPreconditionerConfig(
            use_symmetric_packing=False
        )
    )[1],
    "one parameter less": lambda: build(shapes=SHAPES[:-1])[1],
    "other shapes": lambda: build(shapes=[(4, 4), *SHAPES[1:]])[1],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    _, optimizer = trained(2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="nothing was changed"):
        optimizer.load_state_dict(copy.deepcopy(WRONG[name]().state_dict()))
    assert_unchanged(optimizer, before)


def test_the_refusal_names_what_is_missing_and_what_is_unknown():
    _, optimizer = build()
    saved = copy.deepcopy(trained()[1].state_dict())
    del saved["state"][2]["block_0"]["adagrad"]
    saved["state"][4]["block_0"]["shampoo"]["factor_matrices"][0] = torch.zeros(3)
    saved["state"][5]["extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(saved)
    message = str(error.value)
    assert "state[2]['block_0']['adagrad'] is missing" in message
    assert "['factor_matrices'][0] has shape (3,) instead of (36,)" in message
    assert "state[5]['extra'] is not known here" in message


def test_parameters_with_different_pasts_cannot_share_a_group():
    _, optimizer = build()
    before = snapshot(optimizer)
    saved = copy.deepcopy(trained()[1].state_dict())
    saved["state"][4]["step"] = torch.tensor(7)
    with pytest.raises(ValueError, match=r"\['step'\] is 7, but 3 for others"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_hyper_parameters_come_from_the_state_and_structure_does_not():
    _, source = trained(lr=0.7, weight_decay=0.3)
    _, optimizer = build()
    saved = copy.deepcopy(source.state_dict())
    saved["param_groups"][0]["initial_lr"] = 0.9
    kept = optimizer.param_groups[0]["preconditioner_config"]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["initial_lr"]) == (0.7, 0.3, 0.9)
    assert group["preconditioner_config"] is kept
    assert len(group["params"]) == 3


@pytest.mark.parametrize("saved_in_eval", [True, False])
@pytest.mark.parametrize("loaded_in_eval", [True, False])
def test_the_mode_of_the_optimizer_survives_loading(saved_in_eval, loaded_in_eval):
    params, source = trained()
    if saved_in_eval:
        source.eval()
    values = [p.detach().clone() for p in params]
    successors, optimizer = build()
    if loaded_in_eval:
        optimizer.eval()
    with torch.no_grad():
        for new, value in zip(successors, values, strict=True):
            new.copy_(value)
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    for lists in optimizer._per_group_state_lists:
        assert bool(lists["train_mode"]) is not loaded_in_eval
    source.eval() if loaded_in_eval else source.train()
    for p, q in zip(successors, params, strict=True):
        torch.testing.assert_close(p, q)


def test_hooks_are_called():
    _, source = trained()
    _, optimizer = build()
    seen = []

    def double_steps(hooked, state_dict):
        assert hooked is optimizer
        state_dict["state"] = copy.deepcopy(state_dict["state"])
        for param_state in state_dict["state"].values():
            param_state["step"] = param_state["step"] * 2
        return state_dict

    optimizer.register_load_state_dict_pre_hook(double_steps)
    optimizer.register_load_state_dict_post_hook(lambda hooked: seen.append(hooked))
    optimizer.load_state_dict(source.state_dict())
    assert seen == [optimizer]
    assert optimizer.state_dict()["state"][0]["step"] == 6
    assert source.state_dict()["state"][0]["step"] == 3


class Model(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.all = torch.nn.ParameterList(params)


@pytest.mark.parametrize("flatten_keys", [False, True])
def test_the_state_goes_through_torch_distributed_checkpoint(flatten_keys):
    # Flattened, the config objects of a group could not be put together again.
    options = StateDictOptions(flatten_optimizer_state_dict=flatten_keys)
    params, source = trained()
    successors, optimizer = build()
    saved = get_optimizer_state_dict(Model(params), source, options=options)
    set_optimizer_state_dict(Model(successors), optimizer, saved, options=options)
    assert snapshot(optimizer)[0].keys() == snapshot(source)[0].keys()
    for key, value in snapshot(source)[0].items():
        assert torch.equal(snapshot(optimizer)[0][key], value), key
