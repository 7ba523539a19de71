"""What an optimizer tells of its blocks and factor matrices on request."""

import copy
import math

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.diagnostics import HISTORY
from tests.preconditioners.list_table import LISTS, Row, build, gradients, parameters

STEPS = 4


def run(row: Row, collects: bool = True, shapes=None, **options):
    shapes = row.shapes if shapes is None else shapes
    params = parameters(shapes, torch.float32)
    optimizer = build(row, params, torch.float32, **options)
    optimizer.collects_diagnostics = collects
    for grads in gradients(shapes, torch.float32, STEPS):
        before = [p.detach().clone() for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, before, optimizer


@pytest.mark.parametrize("row", LISTS, ids=str)
def test_every_list_tells_of_every_block(row):
    params, _, optimizer = run(row)
    blocks = optimizer.diagnostics()
    assert {block.parameter for block in blocks} == {f"parameter {i}" for i in range(len(params))}
    for block in blocks:
        assert block.failures == 0
        assert math.isfinite(block.update_to_weight)
        for factor in block.factors:
            assert factor.size == block.shape[factor.dimension]
            assert factor.condition >= 1 - 1e-6
            assert 0 <= factor.residual < 1
            assert factor.factor_norm > 0
            assert factor.steps_since_good_root == 0
    has_factors = any(block.factors for block in blocks)
    assert has_factors == ("factor_matrices" in row.keys)


@pytest.mark.parametrize("name", ["root_inv", "soap", "sign_descent"])
def test_relative_updates_are_those_of_the_last_step(name):
    row = next(row for row in LISTS if row.name == name)
    shapes = ((8, 8), (7, 5))  # one block each
    params, before, optimizer = run(row, shapes=shapes)
    for block, param, old in zip(optimizer.diagnostics(), params, before, strict=True):
        expected = float((param.detach() - old).norm() / param.detach().norm())
        assert block.update_to_weight == pytest.approx(expected, rel=1e-3)


def test_numbers_of_a_factor_matrix_are_those_of_its_eigenvalues():
    row = next(row for row in LISTS if row.name == "root_inv")
    params, _, optimizer = run(row, shapes=((8, 6),), epsilon=1e-4)
    state = optimizer.state[params[0]]
    bias_correction = 1 - 0.95**STEPS
    found = optimizer.diagnostics()[0].factors
    preconditioners = optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"]
    for number, factor in enumerate(found):
        A = preconditioners._factors[number].read(slice(0, 1))[0] / bias_correction
        eigenvalues = torch.linalg.eigvalsh(A) + 1e-4
        condition = float(eigenvalues[-1] / eigenvalues[0])
        assert factor.condition == pytest.approx(condition, rel=0.05)
        assert factor.condition <= condition * 1.001  # an estimate from below
        assert factor.factor_norm == pytest.approx(float(A.norm()), rel=1e-4)
        root = float(eigenvalues.pow(-0.25).norm())
        assert factor.root_norm == pytest.approx(root, rel=1e-3)
        assert factor.residual < 1e-3
    assert state  # the blocks are those of this parameter


def test_roots_that_grow_old_are_further_away():
    row = next(row for row in LISTS if row.name == "root_inv")
    _, _, fresh = run(row, shapes=((8, 8),))
    _, _, old = run(row, shapes=((8, 8),), precondition_frequency=3, start_preconditioning_step=3)
    new, aged = (o.diagnostics()[0].factors[0] for o in (fresh, old))
    assert (new.steps_since_good_root, aged.steps_since_good_root) == (0, 1)
    assert aged.residual > 100 * new.residual


def test_failures_are_counted_by_block_and_a_root_that_failed_is_not_a_good_one():
    solver = ds.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0)
    config = ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=solver, num_tolerated_failed_amortized_computations=9
    )
    params = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    optimizer = ds.DashShampoo(
        params,
        lr=0.1,
        betas=(0.0, 0.0),
        epsilon=1e-6,
        max_preconditioner_dim=8,
        preconditioner_config=config,
    )
    optimizer.collects_diagnostics = True
    for is_singular in (False, True, True):
        for number, param in enumerate(params):
            torch.manual_seed(number)
            param.grad = torch.linalg.qr(torch.randn(8, 8))[0].contiguous()
        if is_singular:
            params[1].grad = params[1].grad[:, :1] @ params[1].grad[:1]
        optimizer.step()
    good, bad = optimizer.diagnostics()
    assert (good.failures, bad.failures) == (0, 4)  # two factors, two steps
    assert {f.steps_since_good_root for f in good.factors} == {0}
    assert {f.steps_since_good_root for f in bad.factors} == {2}


def test_before_the_first_root_there_is_none():
    row = next(row for row in LISTS if row.name == "root_inv")
    optimizer = build(row, parameters(((8, 8),), torch.float32), torch.float32)
    block = optimizer.diagnostics()[0]
    assert math.isnan(block.update_to_weight)
    for factor in block.factors:
        assert math.isnan(factor.condition)
        assert math.isnan(factor.residual)
        assert factor.steps_since_good_root is None


def test_off_it_notes_nothing_and_changes_nothing():
    row = next(row for row in LISTS if row.name == "root_inv")
    watched, _, optimizer = run(row)
    params, _, silent = run(row, collects=False)
    lists = silent._per_group_state_lists[0]
    assert HISTORY not in lists
    assert lists["shampoo_preconditioner_list"].ledger.observer is None
    assert lists["dash_buckets"].observer is None
    for a, b in zip(watched, params, strict=True):
        assert torch.equal(a, b)
    block = silent.diagnostics()[0]
    assert math.isnan(block.update_to_weight)
    # Turned off again, it stops.
    optimizer.collects_diagnostics = False
    optimizer.step()
    assert HISTORY not in optimizer._per_group_state_lists[0]
    assert optimizer._per_group_state_lists[0]["dash_buckets"].observer is None


def test_it_goes_on_over_a_new_group_and_starts_anew_in_a_copy():
    row = next(row for row in LISTS if row.name == "root_inv")
    _, _, optimizer = run(row, shapes=((8, 8),))
    added = torch.nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": [added]})
    for one in (optimizer, copy.deepcopy(optimizer)):
        one.collects_diagnostics = True  # like hooks, it is not copied
        for group in one.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        one.step()
        blocks = one.diagnostics()
        assert len(blocks) == 2
        assert all(math.isfinite(block.update_to_weight) for block in blocks)


def test_parameters_by_grafting_alone_have_updates_too():
    param = torch.nn.Parameter(torch.ones(6))
    config = ds.AdamPreconditionerConfig()
    optimizer = ds.DashShampoo([("scale", param)], lr=0.1, preconditioner_config=config)
    optimizer.collects_diagnostics = True
    param.grad = torch.ones(6)
    optimizer.step()
    (block,) = optimizer.diagnostics()
    assert block.parameter == "scale"
    assert block.factors == ()
    assert block.update_to_weight == pytest.approx(0.1 / 0.9, rel=1e-3)
