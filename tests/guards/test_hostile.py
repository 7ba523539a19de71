"""What nobody does on purpose: values that only look like numbers, memory that parameters share, groups and
states that were edited to pieces, checkpoints of something else. Served, or refused by name; never silent.
"""

from __future__ import annotations

import copy
import math
from decimal import Decimal
from fractions import Fraction

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

np = pytest.importorskip("numpy", reason="numpy is not installed")
pytestmark = pytest.mark.parametrize("config", CONFIGS)

REFUSED = [
    ("lr", Fraction(1, 100)),
    ("lr", Decimal("0.01")),
    ("lr", np.array(0.01)),
    ("lr", np.array([0.1, 0.2])),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor([0.1])),
    ("lr", torch.tensor(True)),
    ("lr", torch.tensor(1 + 0j)),
    ("lr", torch.tensor(0.1, device="meta")),
    ("lr", 1e300),
    ("lr", 10**400),
    ("lr", 1 + 0j),
    ("betas", {0.9, 0.95}),
    ("betas", {0: 0.9, 1: 0.95}),
    ("betas", torch.tensor([0.9, 0.95])),
    ("betas", np.array([0.9, 0.95])),
    ("betas", (torch.tensor(0.9), 0.95)),
    ("betas", (Fraction(9, 10), 0.95)),
    ("epsilon", True),
    ("epsilon", torch.tensor(1e-8)),
    ("epsilon", 1e300),
    ("weight_decay", Fraction(1, 10)),
    ("weight_decay", 1e300),
    ("weight_decay", True),
    ("precondition_frequency", 2.0),
    ("precondition_frequency", torch.tensor(2)),
    ("max_preconditioner_dim", True),
    ("max_preconditioner_dim", -math.inf),
    ("use_bias_correction", np.bool_(True)),
]
SERVED = [
    ("lr", np.float32(0.01)),
    ("lr", np.float64(0.01)),
    ("lr", torch.tensor(1)),
    ("lr", torch.tensor(0.1, dtype=torch.float64)),
    ("betas", [0.9, 0.95]),
    ("betas", range(2)),
    ("betas", (np.float32(0.9), np.float64(0.95))),
    ("epsilon", np.float32(1e-8)),
    ("precondition_frequency", np.int64(2)),
    ("precondition_frequency", 10**30),
    ("max_preconditioner_dim", np.int32(3)),
    ("max_preconditioner_dim", 10**30),
    ("weight_decay", np.float64(0.1)),
]


def names(cases):
    return [f"{name}={value!r}"[:50] for name, value in cases]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=names(REFUSED))
@pytest.mark.parametrize("place", ["argument", "group"])
def test_a_value_that_is_none(config, name, value, place):
    options = {name: value}
    p = torch.nn.Parameter(torch.zeros(4, 4))
    params, arguments = ([p], options) if place == "argument" else ([{"params": [p]} | options], {})
    with pytest.raises((TypeError, ValueError), match=rf"(?s)Invalid {name}.*: must be "):
        construct(params, config, **arguments)


@pytest.mark.parametrize(("name", "value"), SERVED, ids=names(SERVED))
def test_a_value_of_another_kind(config, name, value):
    params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    plain = {np.float32: float, np.float64: float, np.int64: int, np.int32: int, range: tuple}
    same = plain.get(type(value), lambda x: x)(value)
    for p, given in zip(params, (value, same), strict=True):
        optimizer = construct([p], config, **{name: given})
        for step in range(4):
            p.grad = torch.eye(4) + step
            optimizer.step()
    assert not torch.equal(params[0].detach(), torch.ones(4, 4))
    assert torch.equal(*params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: torch.nn.Linear(2, 2),
            r"module Linear: give its parameters, model.parameters\(\)",
        ),
        (lambda p: {"params": [p]}, r"params is a dict: a parameter group stands in a list"),
        (lambda p: {p}, "params is a set, which has no order"),
        (
            lambda p: [torch.nn.Parameter(torch.ones(1, 4).expand(4, 4))],
            r"of shape \(4, 4\) is expanded",
        ),
        (
            lambda p: [
                torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
            ],
            "Parameter 0 of parameter group 0 is a nested tensor",
        ),
    ],
    ids=["module", "dict", "set", "expanded", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_parameters(config, make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        construct(make(torch.nn.Parameter(torch.ones(3, 3))), config)


def test_two_parameters_of_one_memory_are_warned_of(config, caplog):
    memory = torch.randn(8, 4)
    params = {"a": memory[:4], "b": memory[4:], "c": memory[4:].view(2, 8), "d": torch.zeros(0)}
    named = [(name, torch.nn.Parameter(part)) for name, part in params.items()]
    construct([*named[:2], *named[3:]], config)
    assert "same memory" not in caplog.text
    construct(named, config)
    assert "Parameters 'b' and 'c' lie in the same memory" in caplog.text
    optimizer = construct(named[:2], config)
    optimizer.add_param_group({"params": [("e", torch.nn.Parameter(memory))]})
    assert "Parameters 'a' and 'e' lie in the same memory" in caplog.text


# --------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize(
    "edit", [lambda g: g.pop("lr"), lambda g: g.pop("betas")], ids=["lr", "betas"]
)
def test_an_option_that_was_removed(config, edit):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(2))
    edit(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=r"Parameter group 0 has no '(lr|betas)'.*add_param_group"):
        train(model, optimizer, range(2, 3))


def test_a_group_that_was_put_in_by_hand(config):
    model = network()
    optimizer = construct(model[0].parameters(), config)
    train(model, optimizer, range(2))
    optimizer.param_groups.append({"params": [*model[2].parameters()]})
    with pytest.raises(ValueError, match=r"Parameter group 1 has no 'betas'.*add_param_group"):
        train(model, optimizer, range(2, 3))


def test_parameters_without_names_among_those_with(config):
    """Appended or removed by hand: whose the names are is not known any more, and nobody gets a wrong one."""
    model, plain = network(), network()
    optimizer, expected = (
        construct(model.named_parameters(), config),
        construct(plain.parameters(), config),
    )
    train(model, optimizer, range(2))
    train(plain, expected, range(2))
    optimizer.param_groups[0]["params"].append(model[0].weight)  # a second time
    train(model, optimizer, range(2, 4))
    train(plain, expected, range(2, 4))
    assert torch.equal(values(model), values(plain))
    del optimizer.param_groups[0]["params"][:2]
    train(model, optimizer, range(4, 5))
    model[2].weight.grad.fill_(math.nan)
    said = ""
    try:
        optimizer.step()
    except ds.PreconditionerValueError as error:
        said = str(error)
    said += str(optimizer.gradient_failure_counts())
    assert "0 of parameter group 0" in said
    assert "0.weight" not in said


def wholly_replaced(optimizer, p):
    # As a helper does that offloads the state.
    def moved(tree):
        if isinstance(tree, dict):
            return {key: moved(value) for key, value in tree.items()}
        return tree.clone() if isinstance(tree, torch.Tensor) else tree

    optimizer.state[p] = moved(optimizer.state[p])


def without_a_block(optimizer, p):
    optimizer.state[p].pop("block_0", None)


def nonsense(optimizer, p):
    optimizer.state[p] = "nonsense"


@pytest.mark.parametrize(
    "damage", [wholly_replaced, without_a_block, nonsense], ids=lambda f: f.__name__
)
def test_state_that_was_replaced(config, damage):
    """The steps' own values are exported, copied and gone on with, as if nothing had been."""
    models = network(), network()
    optimizers = [construct(m.parameters(), config) for m in models]
    for start, is_copied in ((0, False), (3, True)):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(start, start + 2))
        damage(optimizers[0], models[0][0].weight)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(start + 2, start + 3))
        damage(optimizers[0], models[0][0].weight)
        assert_same_state(
            copy.deepcopy(optimizers[0]) if is_copied else optimizers[0], optimizers[1]
        )
    assert torch.equal(*map(values, models))


@pytest.mark.parametrize(
    "remove",
    [lambda s, p: s.pop(p), lambda s, p: s[p].clear(), lambda s, p: s.__setitem__(p, {})],
    ids=["popped", "cleared", "emptied"],
)
@pytest.mark.parametrize("is_saved_before", [False, True])
def test_state_that_was_removed_begins_anew(config, remove, is_saved_before):
    """As with torch's optimizers; the other parameters go on."""
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    p, other = model[0].weight, model[2].weight
    before = copy.deepcopy(dict(leaves(optimizer.state_dict()["state"][2])))
    remove(optimizer.state, p)
    _ = optimizer.state[torch.nn.Parameter(torch.ones(2))]  # a look that leaves an empty entry
    if is_saved_before:
        saved = optimizer.state_dict()["state"]
        assert {len(tree) for tree in saved.values()} == {2}
        after = dict(leaves(saved[2]))
        assert all(torch.equal(after[key], value) for key, value in before.items())
    train(model, optimizer, range(3, 4))
    assert [int(optimizer.state[q]["step"]) for q in (p, other)] == [1, 4]


# --------------------------------------------------------------------------------- checkpoints


def mapped(tree, change):
    if isinstance(tree, dict):
        return {key: mapped(value, change) for key, value in tree.items()}
    return change(tree) if isinstance(tree, torch.Tensor) and tree.dim() else tree


def with_steps(step):
    def change(state):
        return {**state, "state": {k: {**tree, "step": step} for k, tree in state["state"].items()}}

    return change


def with_tensors(change):
    return lambda state: {**state, "state": mapped(state["state"], change)}


def of_torch(optimizer_class):
    def make(state):
        del state
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        train(model, optimizer, range(2))
        return optimizer.state_dict()

    return make


def with_block(key, value):
    def change(state):
        state["state"][0][key] = value
        return state

    return change


CHECKPOINTS = {
    "AdamW": (of_torch(torch.optim.AdamW), r"block_0.*missing"),
    "SGD": (of_torch(torch.optim.SGD), "no entry for a parameter"),
    "a model": (lambda state: network().state_dict(), "no 'state'.*keys.*weight"),
    "of everything": (lambda state: {"optimizer": state}, r"no 'state'.*\['optimizer'\]"),
    "a list": (lambda state: [state], "it is a list"),
    "a path": (lambda state: "checkpoint.pt", "it is a str"),
    "state a list": (lambda state: {**state, "state": []}, "no 'state'"),
    "groups a dict": (lambda state: {**state, "param_groups": {}}, "no 'param_groups'"),
    "a group a number": (lambda state: {**state, "param_groups": [3]}, r"param_groups\[0\]"),
    "a group empty": (lambda state: {**state, "param_groups": [{}]}, r"param_groups\[0\]"),
    "entry a tensor": (
        lambda state: {**state, "state": {**state["state"], 0: torch.ones(2)}},
        r"state\[0\] is a Tensor",
    ),
    "keys of JSON": (
        lambda state: {**state, "state": {str(k): v for k, v in state["state"].items()}},
        r"state\['0'\] is not known",
    ),
    "complex": (with_tensors(lambda t: t.to(torch.complex64)), "has dtype torch.complex64"),
    "meta": (with_tensors(lambda t: t.to("meta")), "is a tensor on meta"),
    "sparse": (with_tensors(lambda t: t.to_sparse()), "layout torch.sparse_coo"),
    "NumPy": (with_tensors(lambda t: t.numpy()), "not a tensor|missing"),
    "NaN": (with_tensors(lambda t: t * math.nan), "holds nan or inf.*begins anew"),
    "one inf": (with_tensors(lambda t: t.index_fill(0, torch.tensor([0]), math.inf)), "nan or inf"),
    "None": (with_tensors(lambda t: None), "not a tensor|missing"),
    "step negative": (with_steps(torch.tensor(-5)), r"step=tensor\(-5\)"),
    "step NaN": (with_steps(torch.tensor(math.nan)), "nan"),
    "step half": (with_steps(torch.tensor(2.5)), r"step=tensor\(2.5000\)"),
    "step text": (with_steps("3"), "step='3'"),
    "step None": (with_steps(None), "step=None"),
    "step twice": (with_steps(torch.tensor([1, 2])), r"step=tensor\(\[1, 2\]\)"),
    "unknown key": (with_block("mine", {"x": torch.ones(1)}), r"mine.*not known here"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_of_something_else_changes_nothing(config, kind):
    make, message = CHECKPOINTS[kind]
    model, straight = network(), network()
    optimizer, expected = (construct(m.parameters(), config) for m in (model, straight))
    train(model, optimizer, range(2))
    train(straight, expected, range(2))
    state = make(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(
        (TypeError, ValueError), match=f"(?s)Cannot load.*nothing was changed.*({message})"
    ):
        optimizer.load_state_dict(state)
    assert_same_state(optimizer, expected)
    train(model, optimizer, range(2, 4))
    train(straight, expected, range(2, 4))
    assert torch.equal(values(model), values(straight))


def test_an_empty_entry_of_a_checkpoint_begins_anew(config):
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0] = {}
    optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 4))
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_precision(config, dtype):
    """Cast to that of the state, which stays what it is."""
    model = network()
    optimizer = construct(model.parameters(), config)
    train(model, optimizer, range(3))
    expected = copy.deepcopy(dict(leaves(optimizer.state_dict()["state"])))
    state = copy.deepcopy(optimizer.state_dict())
    is_float = torch.Tensor.is_floating_point
    state["state"] = mapped(state["state"], lambda t: t.to(dtype) if is_float(t) else t)
    optimizer.load_state_dict(state)
    found = dict(leaves(optimizer.state_dict()["state"]))
    for key, value in expected.items():
        cast = value.to(dtype).to(value.dtype) if value.dim() and is_float(value) else value
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], cast), key
    train(model, optimizer, range(3, 5))
    assert values(model).isfinite().all()
