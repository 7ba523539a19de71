"""What every list promises of bad gradients and bad factor matrices: refused, or counted and survived."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import dash_shampoo as ds
from tests.preconditioners.list_table import ROWS, Row, build, flat, gradients, parameters

STEPS = 26
START = 20  # factor matrices have full rank by then, so that eigenvectors are unique
GUARDED = tuple(row for row in ROWS if hasattr(row.config(torch.float64), "safety"))
WITH_FACTORS = tuple(row for row in ROWS if row.keys)
each_row = pytest.mark.parametrize("row", ROWS, ids=str)
each_guarded = pytest.mark.parametrize("row", GUARDED, ids=str)
each_with_factors = pytest.mark.parametrize("row", WITH_FACTORS, ids=str)


def test_the_tables_are_not_empty() -> None:
    assert len(GUARDED) >= 10
    assert len(WITH_FACTORS) >= 20
    methods = {type(row.config(torch.float64)).__mro__[2].__name__ for row in GUARDED}
    assert len(methods) == 5, methods  # every method with factor matrices


def victim(row: Row) -> int:
    """The number of a parameter that is one block."""
    return row.shapes.index((8, 8))


def start(
    row: Row, safety: ds.SafetyConfig | None
) -> tuple[list[torch.nn.Parameter], ds.DashShampoo]:
    config = copy.deepcopy(row.config(torch.float64))
    if hasattr(config, "safety"):
        config.safety = safety
    params = parameters(row.shapes, torch.float64)
    names = [(f"p{number}", param) for number, param in enumerate(params)]
    options = {"preconditioner_config": config, "start_preconditioning_step": START}
    return params, build(row, names, torch.float64, **options)


def step(params: list[torch.nn.Parameter], optimizer: ds.DashShampoo, grads: list) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def state_of(optimizer: ds.DashShampoo) -> dict[str, Tensor]:
    return {path: t.clone() for path, t in flat(optimizer.state_dict()["state"]).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Paths at which two states differ; the step count is left out."""
    assert ours.keys() == theirs.keys()
    return [p for p in ours if not p.endswith("step") and not torch.equal(ours[p], theirs[p])]


@each_row
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_a_bad_gradient_raises_and_enters_no_state(row: Row, bad: float) -> None:
    params, optimizer = start(row, None)
    number = victim(row)
    all_grads = list(gradients(row.shapes, torch.float64, 4))
    for grads in all_grads[:2]:
        step(params, optimizer, grads)
    before, weights = state_of(optimizer), [param.detach().clone() for param in params]
    poisoned = [grad.clone() for grad in all_grads[2]]
    poisoned[number].view(-1)[0] = bad
    with pytest.raises(ds.PreconditionerValueError, match=f"gradient.*p{number}"):
        step(params, optimizer, poisoned)
    assert not same(state_of(optimizer), before)
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    assert optimizer.gradient_failure_counts() == {f"p{number}": 1}
    step(params, optimizer, all_grads[3])
    assert all(torch.isfinite(param).all() for param in params)


@each_guarded
def test_a_bad_gradient_is_zero_for_its_block_alone(row: Row) -> None:
    number = victim(row)
    runs = []
    for bad in (torch.nan, 0.0):
        params, optimizer = start(row, ds.SafetyConfig())
        for index, grads in enumerate(gradients(row.shapes, torch.float64, STEPS)):
            if index in (3, 22):
                grads[number] = torch.full_like(grads[number], bad)
            step(params, optimizer, grads)
        runs.append((params, state_of(optimizer), optimizer))
    (params, state, optimizer), (others, other_state, other) = runs
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert not same(state, other_state)
    assert optimizer.gradient_failure_counts() == {f"p{number}": 2}
    assert other.gradient_failure_counts() == {}


@each_guarded
def test_a_step_is_skipped_where_that_is_wanted(row: Row) -> None:
    params, optimizer = start(row, ds.SafetyConfig(gradients="skip_step"))
    all_grads = list(gradients(row.shapes, torch.float64, 3))
    step(params, optimizer, all_grads[0])
    before, weights = state_of(optimizer), [param.detach().clone() for param in params]
    all_grads[1][victim(row)][0, 0] = torch.inf
    step(params, optimizer, all_grads[1])
    assert not same(state_of(optimizer), before)
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    step(params, optimizer, all_grads[2])
    assert not any(torch.equal(p, w) for p, w in zip(params, weights, strict=True))


def poison(optimizer: ds.DashShampoo, number: int) -> None:
    """Makes one factor matrix of a parameter NaN."""
    for path, tensor in flat(optimizer.state_dict()["state"]).items():
        if path.startswith(f"/{number}/block_0/shampoo/factor_matrices/0"):
            tensor.fill_(torch.nan)
            return
    raise AssertionError(f"parameter {number} has no factor matrix")


def poisoned_run(row: Row, safety: ds.SafetyConfig | None, number: int | None) -> tuple:
    params, optimizer = start(row, safety)
    for index, grads in enumerate(gradients(row.shapes, torch.float64, STEPS)):
        if index == 22 and number is not None:
            poison(optimizer, number)
        step(params, optimizer, grads)
    return params, optimizer


@each_with_factors
def test_a_bad_factor_matrix_raises_by_name(row: Row) -> None:
    number = victim(row)
    with pytest.raises(ds.PreconditionerValueError, match=f"factor matrix.*p{number}"):
        poisoned_run(row, None, number)


@each_guarded
@pytest.mark.parametrize("policy", ["keep", "repair"])
def test_a_bad_factor_matrix_is_counted_and_harms_no_other_block(row: Row, policy: str) -> None:
    number = victim(row)
    safety = ds.SafetyConfig(policy=policy)
    if row.options.get("precondition_frequency"):
        pytest.skip("it is not refreshed in every step; test_stagger.py has a bad block of it")
    params, optimizer = poisoned_run(row, safety, number)
    clean, clean_optimizer = poisoned_run(row, safety, None)
    counts, before = optimizer.failure_counts(), clean_optimizer.failure_counts()
    assert counts[f"p{number}"] == before.get(f"p{number}", 0) + STEPS - 22
    assert {k: v for k, v in counts.items() if k != f"p{number}"} == before
    for index, (param, other) in enumerate(zip(params, clean, strict=True)):
        assert torch.isfinite(param).all()
        assert torch.equal(param, other) == (index != number), index
