"""Refreshes spread over the steps of an interval."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dash_shampoo as ds
from tests.preconditioners.list_table import Row as ListRow
from tests.preconditioners.list_table import build, flat, gradients, parameters, run

# 24 blocks of 8 by 8 and a vector, which have 49 factor matrices.
SHAPES = ((16, 16), (8, 64), (24, 32), (8,))
FREQUENCY = 5
FIRST = 7
CONFIGS = {
    "roots": (ds.DashShampooPreconditionerConfig, "inv_factor_matrices"),
    "KL": (ds.DashKLShampooPreconditionerConfig, "inv_factor_matrices"),
    "eigendecomposed": (
        ds.DashEigendecomposedShampooPreconditionerConfig,
        "factor_matrices_eigenvectors",
    ),
    "SOAP": (ds.DashSOAPPreconditionerConfig, "factor_matrices_eigenvectors"),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


def row_of(name: str, **options: object) -> ListRow:
    cls, _ = CONFIGS[name]
    return ListRow(
        name,
        lambda _: cls(**{"stagger_refresh": True, "use_symmetric_packing": False, **options}),
        (),
        SHAPES,
        options={"precondition_frequency": FREQUENCY, "start_preconditioning_step": FIRST},
    )


def matrices(optimizer: ds.DashShampoo, key: str) -> dict[str, Tensor]:
    state = flat(optimizer.state_dict()["state"])
    return {path: tensor.clone() for path, tensor in state.items() if f"/{key}/" in path}


def changes(name: str, steps: int, missing: str = "never") -> list[set[str]]:
    """For every step, whose roots or bases it changed."""
    row, key = row_of(name), CONFIGS[name][1]
    params = parameters(SHAPES, torch.float32)
    optimizer = build(row, params, torch.float32)
    before, changed = matrices(optimizer, key), []
    for grads in gradients(SHAPES, torch.float32, steps, missing):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        after = matrices(optimizer, key)
        changed.append({path for path in after if not torch.equal(after[path], before[path])})
        before = after
    return changed


@each_config
def test_all_are_made_in_the_first_refresh_and_then_a_share_in_every_step(name: str) -> None:
    changed = changes(name, FIRST + 2 * FREQUENCY)
    assert not any(changed[: FIRST - 1])
    every = changed[FIRST - 1]
    assert len(every) == 49
    first, second = changed[FIRST : FIRST + FREQUENCY], changed[FIRST + FREQUENCY :]
    assert first == second
    assert set.union(*first) == every
    assert sum(map(len, first)) == len(every)
    # 49 matrices in five steps.
    assert {len(share) for share in first} <= {9, 10, 11}


def test_a_block_keeps_its_share_when_others_have_no_gradient() -> None:
    full = changes("roots", FIRST + FREQUENCY)
    some = changes("roots", FIRST + FREQUENCY, "some")
    assert all(part <= whole for part, whole in zip(some[FIRST:], full[FIRST:], strict=True))
    assert set.union(*some[FIRST:]) < set.union(*full[FIRST:])


def test_a_root_is_that_of_its_factor_matrix_in_its_step() -> None:
    row = row_of("roots", amortized_computation_config=ds.EigenConfig())
    params = parameters(SHAPES, torch.float32)
    optimizer = build(row, params, torch.float32)
    ages: Counter[int] = Counter()
    kept: list[dict[str, Tensor]] = []
    for grads in gradients(SHAPES, torch.float32, FIRST + FREQUENCY + 2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        # The root of today's factor matrix, as a refresh in this step would leave it.
        step = len(kept) + 1
        exact = {}
        for path, factor in matrices(optimizer, "factor_matrices").items():
            values, vectors = torch.linalg.eigh(factor.double() / (1 - 0.95**step))
            order = 1 if path.startswith("/3/") else 2
            values = values - values[0].clamp(max=0.0) + row.epsilon
            root = (vectors * values.pow(-1 / (2 * order))) @ vectors.mT
            exact[path.replace("factor_matrices", "inv_factor_matrices")] = root
        kept.append(exact)
    for path, root in matrices(optimizer, "inv_factor_matrices").items():
        errors = [float((root - exact[path]).norm() / root.norm()) for exact in kept]
        assert min(errors) < 1e-3
        ages[len(kept) - 1 - errors.index(min(errors))] += 1
    assert set(ages) == set(range(FREQUENCY))


def test_a_resume_within_an_interval_goes_on_with_the_next_share() -> None:
    row = row_of("roots")
    all_gradients = list(gradients(SHAPES, torch.float32, FIRST + 2 * FREQUENCY))
    params = parameters(SHAPES, torch.float32)
    optimizer = build(row, params, torch.float32)
    for number, grads in enumerate(all_gradients):
        if number == FIRST + 2:
            others = [torch.nn.Parameter(param.detach().clone()) for param in params]
            resumed = build(row, others, torch.float32)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            twins = [(params, optimizer), (others, resumed)]
        for some, one in [(params, optimizer)] if number < FIRST + 2 else twins:
            for param, grad in zip(some, grads, strict=True):
                param.grad = grad
            one.step()
    assert all(map(torch.equal, params, others))


def test_refreshed_in_every_step_it_changes_nothing() -> None:
    options = {"precondition_frequency": 1, "start_preconditioning_step": 1}
    params, _ = run(row_of("roots"), torch.float32, 6, **options)
    others, _ = run(row_of("roots", stagger_refresh=False), torch.float32, 6, **options)
    assert all(map(torch.equal, params, others))


def test_a_frequency_that_is_changed_is_obeyed() -> None:
    row = row_of("roots")
    params = parameters(SHAPES, torch.float32)
    optimizer = build(row, params, torch.float32)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before: dict[str, Tensor] = {}
    for step, grads in enumerate(gradients(SHAPES, torch.float32, FIRST + 2), 1):
        if step > FIRST:
            optimizer.param_groups[0]["precondition_frequency"] = 2
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        after = matrices(optimizer, "inv_factor_matrices")
        changed = sum(not torch.equal(after[p], before[p]) for p in before)
        before = after
    assert changed in range(23, 27)


def test_a_bad_block_is_repaired_in_its_own_step() -> None:
    row = row_of("roots", safety=ds.SafetyConfig(), amortized_computation_config=ds.MinimaxConfig())
    params = parameters(SHAPES, torch.float32)
    optimizer = build(row, params, torch.float32)
    for step, grads in enumerate(gradients(SHAPES, torch.float32, FIRST + FREQUENCY), 1):
        if step == FIRST + 1:  # not definite any more, whatever this step adds
            for path, tensor in flat(optimizer.state_dict()["state"]).items():
                if path.startswith("/0/") and "/factor_matrices/" in path:
                    tensor.neg_()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    counts = optimizer.failure_counts()
    assert counts.keys() == {"parameter 0"}
    assert counts["parameter 0"] == 8
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("is_staggered", [True, False])
def test_no_step_has_much_more_work_than_the_others(is_staggered: bool) -> None:
    row = row_of(
        "roots",
        stagger_refresh=is_staggered,
        amortized_computation_config=ds.MinimaxConfig(),
        safety=ds.SafetyConfig(),
    )
    params = parameters(SHAPES, torch.float32)
    optimizer = build(row, params, torch.float32)
    work = []
    for grads in gradients(SHAPES, torch.float32, FIRST + 2 * FREQUENCY):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        work.append(counter.get_total_flops())
    work = work[FIRST:]
    ratio = max(work) / (sum(work) / len(work))
    assert ratio <= 1.3 if is_staggered else ratio > 2.0
