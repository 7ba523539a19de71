"""What people do wrong: refused at construction (or at the step) by name, value and what is allowed; and
odd tensors and checkpoints that are served, or refused the same way. With both configs.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

import dash_shampoo as ds
from tests.guards.common import CONFIGS, construct, network, train, values

pytestmark = pytest.mark.parametrize("config", CONFIGS)

NAN, INF = math.nan, math.inf
# Option, value, and what the message must name besides.
VALUES = [
    ("lr", -1.0, "-1.0"),
    ("lr", INF, "inf"),
    ("lr", NAN, "nan"),
    ("lr", "1e-3", "'1e-3'"),
    ("lr", None, "None"),
    ("lr", True, "True"),
    ("lr", torch.tensor(-1.0), "tensor"),
    ("betas", 0.9, "0.9"),
    ("betas", (0.9,), r"0\.9"),
    ("betas", (0.9, 0.95, 0.99), r"0\.99"),
    ("betas", "ab", "'ab'"),
    ("betas", (1.0, 0.9), r"\[0\]"),
    ("betas", (-0.1, 0.9), r"\[0\]"),
    ("betas", (0.9, 1.1), r"\[1\]"),
    ("betas", (NAN, 0.9), r"\[0\].*nan"),
    ("betas", (0.9, NAN), r"\[1\].*nan"),
    ("betas", ("0.9", 0.9), r"\[0\]"),
    ("beta3", 1.0, r"1\.0"),
    ("beta3", -0.5, "-0.5"),
    ("beta3", "beta1", "'beta1'"),
    ("epsilon", 0.0, r"0\.0"),
    ("epsilon", -1e-8, "-1e-08"),
    ("epsilon", INF, "inf"),
    ("epsilon", NAN, "nan"),
    ("epsilon", "1e-8", "'1e-8'"),
    ("weight_decay", -0.1, "-0.1"),
    ("weight_decay", INF, "inf"),
    ("weight_decay", NAN, "nan"),
    ("weight_decay", "0", "'0'"),
    ("weight_decay_type", "L2", "WeightDecayType.L2"),
    ("weight_decay_type", None, "WeightDecayType"),
    ("weight_decay_type", ds.WeightDecayType, "WeightDecayType"),
    ("max_preconditioner_dim", 0, "0"),
    ("max_preconditioner_dim", -4, "-4"),
    ("max_preconditioner_dim", 512.5, r"512\.5"),
    ("max_preconditioner_dim", "1024", "'1024'"),
    ("max_preconditioner_dim", NAN, "nan"),
    ("max_preconditioner_dim", None, "None"),
    ("precondition_frequency", 0, "0"),
    ("precondition_frequency", 1.5, r"1\.5"),
    ("precondition_frequency", "10", "'10'"),
    ("precondition_frequency", True, "True"),
    ("start_preconditioning_step", -2, "-2"),
    ("start_preconditioning_step", 0, "0"),
    ("start_preconditioning_step", 2.5, r"2\.5"),
    ("use_bias_correction", 1, "True or False"),
    ("use_bias_correction", "yes", "'yes'"),
    ("use_pin_memory", None, "True or False"),
    ("iterate_averaging_config", "ema", "'ema'"),
    ("iterate_averaging_config", ds.ScheduleFreeConfig, "instance"),
    ("grafting_config", "adam", "'adam'"),
    ("grafting_config", ds.AdamPreconditionerConfig, "instance"),
    ("distributed_config", None, "DistributedConfig"),
    ("distributed_config", "ddp", "'ddp'"),
    ("preconditioner_config", None, "None"),
    ("preconditioner_config", ds.NewtonDBConfig(), "wrap it"),
    ("preconditioner_config", ds.EigenConfig(), "wrap it"),
    ("preconditioner_config", ds.RootInvShampooPreconditionerConfig, "instance"),
    ("preconditioner_config", "shampoo", "'shampoo'"),
]
IDS = [f"{name}={value!r}"[:60] for name, value, _ in VALUES]


@pytest.mark.parametrize(("name", "value", "named"), VALUES, ids=IDS)
@pytest.mark.parametrize("place", ["argument", "group"])
def test_a_wrong_value(config, name, value, named, place):
    p = torch.nn.Parameter(torch.zeros(4, 4))
    options = {name: value}
    params, arguments = ([p], options) if place == "argument" else ([{"params": [p]} | options], {})
    with pytest.raises((TypeError, ValueError), match=f"(?s){name}.*{named}|{named}.*{name}"):
        construct(params, config, **arguments)


@pytest.mark.parametrize(
    "name", ["shampoo_pt2_compile_config", "shampoo_runtime_config", "concurrency_config"]
)
def test_a_wrong_config_of_the_optimizer(config, name):
    with pytest.raises(TypeError, match=f"{name}='fast'"):
        construct([torch.nn.Parameter(torch.zeros(4, 4))], config, **{name: "fast"})


@pytest.mark.parametrize(
    ("path", "make"),
    [
        (
            "grafting_config.epsilon",
            lambda: with_field(ds.AdamPreconditionerConfig(), "epsilon", NAN),
        ),
        (
            "grafting_config.beta2",
            lambda: with_field(ds.AdamPreconditionerConfig(), "beta2", "0.9"),
        ),
        (
            "grafting_config.epsilon",
            lambda: with_field(ds.AdamPreconditionerConfig(), "epsilon", torch.ones(())),
        ),
    ],
)
def test_a_wrong_field_of_a_config(config, path, make):
    with pytest.raises((TypeError, ValueError), match=path):
        construct([torch.nn.Parameter(torch.zeros(4, 4))], config, grafting_config=make())


def with_field(made, name, value):
    setattr(made, name, value)
    return made


def test_a_peak_of_zero(config):
    p = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="peak_lr"):
        construct([p], config, lr=0.0, weight_decay_type=ds.WeightDecayType.CORRECTED)


def test_an_unknown_argument(config):
    p = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"weight_dacay.*weight_decay"):
        construct([p], config, weight_dacay=0.1)
    with pytest.raises(TypeError, match="momentum"):
        construct([p], config, momentum=0.1)


def test_an_unknown_option_of_a_group(config, caplog):
    p = torch.nn.Parameter(torch.zeros(4, 4))
    construct([{"params": [p], "weight_dacay": 0.1, "name": "mine"}], config)
    assert "weight_dacay of parameter group 0: was weight_decay meant?" in caplog.text
    assert "mine" not in caplog.text


# ------------------------------------------------------------------------------------- tensors


class Lazy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.LazyLinear(4)


ODD_PARAMETERS = {
    "complex": (lambda: torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64)), "complex"),
    "integer": (
        lambda: torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.int64), requires_grad=False),
        "int64",
    ),
    "bool": (
        lambda: torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.bool), requires_grad=False),
        "bool",
    ),
    "sparse": (lambda: torch.zeros(3, 3).to_sparse().requires_grad_(), "sparse_coo"),
    "lazy": (lambda: Lazy().layer.weight, "lazy"),
    "meta": (lambda: torch.nn.Parameter(torch.zeros(3, 3, device="meta")), "materialise"),
    "float8": (
        lambda: torch.zeros(3, 3).to(torch.float8_e4m3fn).requires_grad_(),
        "float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("kind", ODD_PARAMETERS)
@pytest.mark.parametrize("is_named", [False, True])
def test_a_parameter_that_cannot_be_trained(config, kind, is_named):
    make, word = ODD_PARAMETERS[kind]
    good, odd = torch.nn.Parameter(torch.zeros(2, 2)), make()
    params = [("good", good), ("odd", odd)] if is_named else [good, odd]
    name = "'odd'" if is_named else "1 of parameter group 0"
    with pytest.raises((TypeError, ValueError), match=f"Parameter {name}.*{word}"):
        construct(params, config)


@pytest.mark.parametrize(
    "params", [3, torch.zeros(3), [torch.zeros(2) * torch.ones(2, requires_grad=True)]]
)
def test_what_is_no_list_of_parameters(config, params):
    with pytest.raises((TypeError, ValueError)):
        construct(params, config)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (1, 7), (5, 1, 1), (2, 3, 4, 5)])
def test_an_odd_shape(config, shape):
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = construct([p], config, weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.ones(shape)
        optimizer.step()
    assert torch.isfinite(p).all()
    assert p.numel() == 0 or not torch.equal(p.detach(), torch.ones(shape))


def test_a_shared_parameter(config):
    """Once through two modules: torch lists it once. Twice in a list: trained once, with torch's warning."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = construct([p, p], config)
    once = torch.nn.Parameter(torch.ones(4, 4))
    single = construct([once], config)
    for _ in range(3):
        p.grad, once.grad = torch.eye(4), torch.eye(4)
        optimizer.step()
        single.step()
    assert torch.equal(p, once)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match="more than one parameter group"):
        construct([{"params": [p]}, {"params": [p]}], config)


def test_a_sparse_gradient(config):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = construct(embedding.named_parameters(), config)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_steps_without_gradients(config):
    model = network()
    optimizer = construct(model.parameters(), config, weight_decay=0.1)
    before = values(model)
    with pytest.warns(UserWarning, match=r"No parameter has a gradient \(the first is 0 of"):
        optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(before, values(model))


# --------------------------------------------------------------------------------- checkpoints


def saved_state(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    return copy.deepcopy(optimizer.state_dict())


def without_a_parameter(state):
    del state["state"][0]


def without_a_key(state):
    del state["state"][1]["block_0"]["shampoo"]


def without_filtered_gradient(state):
    del state["state"][1]["block_0"]["filtered_grad"]


def of_another_shape(state):
    block = state["state"][0]["block_0"]
    block["filtered_grad"] = torch.zeros(3, 3)


def without_a_group(state):
    state["param_groups"].pop()


def with_too_many_parameters(state):
    state["param_groups"][0]["params"].append(99)


def with_an_unknown_parameter(state):
    state["state"][99] = state["state"][0]


def with_a_bad_lr(state):
    state["param_groups"][0]["lr"] = NAN


def with_bad_betas(state):
    state["param_groups"][0]["betas"] = (0.9, 2.0)


def with_different_steps(state):
    state["state"][0]["step"] = torch.tensor(7)


@pytest.mark.parametrize(
    "damage",
    [
        without_a_parameter,
        without_a_key,
        without_filtered_gradient,
        of_another_shape,
        without_a_group,
        with_too_many_parameters,
        with_an_unknown_parameter,
        with_a_bad_lr,
        with_bad_betas,
    ],
    ids=lambda f: f.__name__,
)
def test_a_damaged_checkpoint_changes_nothing(config, damage):
    state = saved_state(config)
    damage(state)
    model, straight = network(), network()
    optimizer, expected = (construct(m.parameters(), config) for m in (model, straight))
    train(model, optimizer, range(2))
    train(straight, expected, range(2))
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(2, 5))
    train(straight, expected, range(2, 5))
    assert torch.equal(values(model), values(straight))


def test_parameters_of_different_ages(config):
    state = saved_state(config)
    with_different_steps(state)
    model = network()
    optimizer = construct(model.parameters(), config)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(1))
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [8, 4, 4, 4]


def test_a_checkpoint_of_other_settings(config, caplog):
    state = saved_state(config)
    model = network()
    optimizer = construct(model.parameters(), config, lr=0.5, max_preconditioner_dim=2048)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["max_preconditioner_dim"] == 2048
    assert (
        "max_preconditioner_dim of parameter group 0 stays the constructor's, 2048" in caplog.text
    )
    blocked = construct(model.parameters(), config, max_preconditioner_dim=4)
    with pytest.raises(ValueError, match="nothing was changed"):
        blocked.load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"state": {}}, None, {"state": {}, "param_groups": []}])
def test_what_is_no_checkpoint(config, state):
    optimizer = construct(network().parameters(), config)
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(state)
