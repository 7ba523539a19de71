"""The stacked list itself: memory, masks, chunks, failures and the options of its own config."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.inverse_root import InverseRootStatus, solve_stack
from dash_shampoo.inverse_root.registry import _log_second
from dash_shampoo.preconditioners import StackedRootInvShampooPreconditionerList
from dash_shampoo.preconditioners.seams import LIST_SEAMS, missing_seam

SHAPES = [(8, 8), (20, 13), (5,), (), (3, 4, 5)]
SOLVE = "dash_shampoo.preconditioners.root_inverse.solve_stack"
BLOCK_SEAMS = StackedRootInvShampooPreconditionerList.block_seams


def build(config=None, shapes=SHAPES, cls=ds.DashShampoo, dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    settings = {"lr": 0.1, "epsilon": 1e-6, "max_preconditioner_dim": 8} | settings
    if config is not None:
        settings["preconditioner_config"] = config
    return cls(params, **settings), params


def step(optimizer, params, seed=0, scale=1.0, spoil=()):
    generator = torch.Generator().manual_seed(seed)
    for index, p in enumerate(params):
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if index in spoil:
            p.grad.view(-1)[0] = torch.nan
    optimizer.step()


def stacked(optimizer):
    preconditioners = optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"]
    assert isinstance(preconditioners, StackedRootInvShampooPreconditionerList)
    return preconditioners


def state_tensors(optimizer):
    for block in stacked(optimizer)._local_kronecker_factors_unwrapped:
        yield from block.factor_matrices
        yield from block.inv_factor_matrices


@pytest.mark.parametrize("packing", [True, False])
def test_state_tensors_are_the_stacks_and_nothing_is_held_twice(packing):
    config = ds.RootInvShampooPreconditionerConfig(use_symmetric_packing=packing)
    optimizer, params = build(config)
    step(optimizer, params)
    lists = stacked(optimizer)
    spans = []
    for stack in (*lists._factors, *lists._inverse_factors):
        begin = stack.data.data_ptr()
        spans.append((begin, begin + stack.data.numel() * stack.data.element_size()))
    tensors = list(state_tensors(optimizer))
    assert tensors
    for tensor in tensors:
        assert any(begin <= tensor.data_ptr() < end for begin, end in spans)
    assert sum(t.untyped_storage().nbytes() for t in tensors) == sum(e - b for b, e in spans)
    stored = optimizer.state_dict()["state"][0]["block_0"]["shampoo"]["factor_matrices"]
    first = next(iter(stored.values())) if isinstance(stored, dict) else stored[0]
    assert any(begin <= first.data_ptr() < end for begin, end in spans)


def test_a_saved_state_holds_only_its_own_bytes():
    def size(cls):
        optimizer, params = build(shapes=[(64, 64)] * 4, cls=cls, max_preconditioner_dim=32)
        step(optimizer, params)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        return buffer.tell()

    assert size(ds.DashShampoo) <= 1.01 * size(ds.DistributedShampoo)


def test_resuming_continues_bit_for_bit_and_views_survive():
    straight, straight_params = build()
    for seed in range(6):
        step(straight, straight_params, seed)

    first, params = build()
    for seed in range(3):
        step(first, params, seed)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)

    second, resumed = build()
    with torch.no_grad():
        for p, q in zip(resumed, params, strict=True):
            p.copy_(q)
    before = [t.data_ptr() for t in state_tensors(second)]
    second.load_state_dict(torch.load(buffer, weights_only=False))
    assert [t.data_ptr() for t in state_tensors(second)] == before
    for seed in range(3, 6):
        step(second, resumed, seed)
    for p, q in zip(resumed, straight_params, strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_goes_over_to_the_base_and_back():
    dash, dash_params = build()
    base, base_params = build(cls=ds.DistributedShampoo)
    step(dash, dash_params)
    base.load_state_dict(dash.state_dict())
    with torch.no_grad():
        for p, q in zip(base_params, dash_params, strict=True):
            p.copy_(q)
    step(base, base_params, seed=1)
    back, back_params = build()
    with torch.no_grad():
        for p, q in zip(back_params, base_params, strict=True):
            p.copy_(q)
    back.load_state_dict(base.state_dict())
    step(back, back_params, seed=2)
    for seed in (1, 2):
        step(dash, dash_params, seed)
    for p, q in zip(back_params, dash_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_a_small_workspace_gives_the_same_result(packing):
    results = []
    for workspace in (2**30, 1):
        config = ds.DashShampooPreconditionerConfig(
            max_workspace_bytes=workspace, use_symmetric_packing=packing
        )
        optimizer, params = build(config, shapes=[(8, 8)] * 5 + [(24, 20)])
        for seed in range(3):
            step(optimizer, params, seed)
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize(
    "solver",
    [ds.EigenConfig(), ds.CoupledNewtonConfig(), ds.NewtonDBConfig(), ds.ChebyshevConfig()],
)
@pytest.mark.parametrize("grafting", [None, ds.AdamPreconditionerConfig()])
def test_extreme_gradients_leave_no_nan(scale, solver, grafting):
    config = ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=solver, inverse_exponent_override={3: 0.25}
    )
    optimizer, params = build(config, grafting_config=grafting, betas=(0.9, 0.999))
    try:
        for seed in range(3):
            step(optimizer, params, seed, scale=scale)
    except ds.PreconditionerValueError:
        # The base's rule for what overflows: squares of 1e30 are infinite in fp32, and undamped coupled
        # Newton diverges on the singular factors that 1e15 gives. The error comes before any NaN.
        assert scale == 1e30 or (scale == 1e15 and isinstance(solver, ds.CoupledNewtonConfig))
    assert all(torch.isfinite(p).all() for p in params)
    for block in stacked(optimizer)._local_kronecker_factors_unwrapped:
        assert all(torch.isfinite(root).all() for root in block.inv_factor_matrices)


def test_gradients_whose_squares_overflow_raise_before_a_parameter_changes():
    optimizer, params = build()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ds.PreconditionerValueError, match=r"0\.block_0 of"):
        step(optimizer, params, scale=1e30)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("policy", ["repair", "keep"])
def test_with_safety_overflowing_gradients_count_as_zero(policy):
    config = ds.DashShampooPreconditionerConfig(safety=ds.SafetyConfig(policy=policy))
    optimizer, params = build(
        config, grafting_config=ds.AdamPreconditionerConfig(), betas=(0.9, 0.999)
    )
    for seed, scale in enumerate([1.0, 1e30, 1.0]):
        step(optimizer, params, seed, scale=scale)
    assert all(torch.isfinite(p).all() for p in params)
    assert all(torch.isfinite(t).all() for t in state_tensors(optimizer))


def test_a_nan_gradient_names_the_lowest_block_and_its_parameter():
    params = {
        "first.weight": torch.nn.Parameter(torch.zeros(8, 8)),
        "second.weight": torch.nn.Parameter(torch.zeros(20, 13)),
    }
    optimizer = ds.DashShampoo(params.items(), max_preconditioner_dim=8)
    with pytest.raises(ds.PreconditionerValueError, match=r"1\.block_0 of second\.weight"):
        step(optimizer, list(params.values()), spoil={1})


def every_tensor(optimizer):
    def walk(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from walk(part)

    yield from walk(optimizer.state_dict()["state"])


BAD = {"nan": torch.nan, "inf": torch.inf, "squares overflow": 1e30}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("frequency", [1, 5])
@pytest.mark.parametrize("grafting", [None, ds.AdamPreconditionerConfig()])
def test_a_bad_gradient_raises_and_the_state_is_as_it_was(value, frequency, grafting):
    """Whether or not roots are due; the next good step goes on as if nothing had been."""
    runs = []
    for is_spoiled in (False, True):
        optimizer, params = build(
            grafting_config=grafting, betas=(0.9, 0.95), precondition_frequency=frequency
        )
        step(optimizer, params)
        if is_spoiled:
            before = [p.detach().clone() for p in params]
            params[1].grad.view(-1)[3] = value
            with pytest.raises(ds.PreconditionerValueError, match="parameter 1"):
                optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
            assert optimizer.gradient_failure_counts() == {"parameter 1": 1}
            stacked(optimizer)
        step(optimizer, params, seed=1)
        runs.append([p.detach() for p in params])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_with_safety_a_bad_block_is_skipped_and_the_others_do_not_notice(value):
    config = ds.DashShampooPreconditionerConfig(safety=ds.SafetyConfig())
    settings = dict(grafting_config=ds.AdamPreconditionerConfig(), betas=(0.9, 0.95))
    runs = {}
    for kind, entry in (("zero", None), ("bad", value)):
        optimizer, params = build(config, shapes=[(8, 8)] * 3, **settings)
        for seed in range(4):
            step(optimizer, params, seed)
            if seed == 1:
                if entry is None:
                    params[1].grad.zero_()
                else:
                    params[1].grad.view(-1)[3] = entry
                optimizer.step()
        runs[kind] = params, optimizer
    for p, q in zip(runs["zero"][0], runs["bad"][0], strict=True):
        assert torch.equal(p, q)
    assert runs["bad"][1].gradient_failure_counts() == {"parameter 1": 1}
    assert runs["zero"][1].gradient_failure_counts() == {}
    assert all(torch.isfinite(value).all() for value in every_tensor(runs["bad"][1]))


@pytest.mark.parametrize("averaging", [None, ds.ScheduleFreeConfig()])
def test_a_refused_gradient_leaves_all_groups_as_they_were(averaging):
    """Also those that would have stepped before it."""
    runs = []
    for is_spoiled in (False, True):
        params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
        optimizer = ds.DashShampoo(
            [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:]}],
            betas=(0.9, 0.95),
            iterate_averaging_config=averaging,
        )
        step(optimizer, params)
        if is_spoiled:
            before = [value.clone() for value in every_tensor(optimizer)]
            for spoil in (1, 2):
                with pytest.raises(ds.PreconditionerValueError, match=f"parameter {spoil} has nan"):
                    step(optimizer, params, spoil={spoil})
            after = every_tensor(optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert optimizer.gradient_failure_counts() == {"parameter 1": 1, "parameter 2": 1}
        step(optimizer, params, seed=1)
        runs.append([p.detach() for p in params] + list(every_tensor(optimizer)))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_skip_step_leaves_everything_as_it_is():
    config = ds.DashShampooPreconditionerConfig(safety=ds.SafetyConfig(gradients="skip_step"))
    optimizer, params = build(config, betas=(0.9, 0.95), weight_decay=0.1)
    step(optimizer, params)
    before = [value.clone() for value in every_tensor(optimizer) if value.dim()]
    weights = [p.detach().clone() for p in params]
    step(optimizer, params, seed=1, spoil={0})
    assert all(torch.equal(p, q) for p, q in zip(params, weights, strict=True))
    after = [value for value in every_tensor(optimizer) if value.dim()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    step(optimizer, params, seed=2)
    assert not torch.equal(params[0], weights[0])


def test_a_large_fp16_gradient_is_no_overflow():
    """Its squares overflow in fp16, not in the fp32 of the factor matrices."""
    config = ds.DashShampooPreconditionerConfig(safety=ds.SafetyConfig())
    optimizer, params = build(config, shapes=[(8, 8)], dtype=torch.float16, lr=1e-3)
    before = params[0].detach().clone()
    step(optimizer, params, scale=300.0)
    assert optimizer.gradient_failure_counts() == {}
    assert not torch.equal(params[0], before)


def test_two_groups_with_bad_gradients_leave_no_error_for_a_later_step(monkeypatch):
    as_an_accelerator(monkeypatch)
    params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    optimizer = ds.DashShampoo([{"params": [p]} for p in params])
    with pytest.raises(ds.PreconditionerValueError, match="parameter 1"):
        step(optimizer, params, spoil={1, 2})
    step(optimizer, params, seed=1)
    assert optimizer.gradient_failure_counts() == {"parameter 1": 1, "parameter 2": 1}


def test_bad_gradients_of_groups_without_roots_are_told_of_in_time(monkeypatch):
    as_an_accelerator(monkeypatch)
    params = [torch.nn.Parameter(torch.ones(4, 4))]
    optimizer = ds.DashShampoo(params, preconditioner_config=ds.AdamPreconditionerConfig())
    for seed in range(99):
        step(optimizer, params, seed, spoil={0} if seed == 3 else ())
    with pytest.raises(ds.PreconditionerValueError, match="parameter 0"):
        step(optimizer, params)
    assert torch.isfinite(params[0]).all()
    step(optimizer, params)


def test_counts_survive_what_constructs_the_base_anew(monkeypatch):
    monkeypatch.setattr(SOLVE, inaccurate([0]))
    optimizer, params = build(safe("keep"), **SQUARES)
    step(optimizer, params, spoil={1})
    counts = optimizer.failure_counts(), optimizer.gradient_failure_counts()
    assert counts == ({"parameter 0": 1}, {"parameter 1": 1})
    before = stacked(optimizer)
    for p in params:
        p.data = p.data.clone()
    for p in params:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(SOLVE, solve_stack)
    optimizer.step()
    assert stacked(optimizer) is not before
    assert (optimizer.failure_counts(), optimizer.gradient_failure_counts()) == counts


@pytest.mark.parametrize("grafting", [None, ds.AdamPreconditionerConfig()])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_steep_exponents_without_grafting_are_warned_of(grafting, exponent, caplog):
    config = ds.DashShampooPreconditionerConfig(inverse_exponent_override={2: exponent})
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        build(config, shapes=[(8, 8)], grafting_config=grafting)
    is_warned = "updates grow as its gradients shrink" in caplog.text
    assert is_warned == (grafting is None and exponent == 0.5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "config",
    [ds.RootInvShampooPreconditionerConfig, ds.EigendecomposedShampooPreconditionerConfig],
)
def test_a_factor_of_zeros_keeps_its_root(config, packing):
    """The root of its damping alone, 1e-12^(-1/4), would multiply the first gradient that comes."""
    optimizer, params = build(
        config(use_symmetric_packing=packing),
        shapes=[(8, 8)] * 2,
        epsilon=1e-12,
        precondition_frequency=2,
        betas=(0.0, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    for is_first_zero in (True, True, False):  # roots are due in the second step
        params[0].grad = torch.randn(8, 8, generator=generator) * (not is_first_zero)
        params[1].grad = torch.randn(8, 8, generator=generator)
        before = [p.detach().clone() for p in params]
        optimizer.step()
    steps = [p.detach() - q for p, q in zip(params, before, strict=True)]
    torch.testing.assert_close(steps[0], -0.1 * params[0].grad, rtol=1e-5, atol=1e-6)
    # The other has its own root.
    assert not torch.allclose(steps[1], -0.1 * params[1].grad, rtol=0.1)


def as_an_accelerator(monkeypatch):
    """Lets the CPU stand in for a device whose values the host has to wait for."""
    for module in ("gradients", "preconditioners.stacked", "preconditioners.root_inverse"):
        monkeypatch.setattr(f"dash_shampoo.{module}.is_asynchronous", lambda device: True)


@dataclass(kw_only=True)
class UnknownConfig(ds.RootInvConfig):
    pass


def test_an_unknown_solver_is_refused_by_the_constructor():
    config = ds.RootInvShampooPreconditionerConfig(amortized_computation_config=UnknownConfig())
    with pytest.raises(ValueError, match="UnknownConfig"):
        build(config)


def test_a_root_the_solver_cannot_compute_goes_to_minimax(caplog):
    """Newton-DB has roots 2, 4 and 8: a tensor of order 3 needs the sixth, one of order 4 the eighth."""
    shapes = [(8, 8), (3, 4, 5), (2, 3, 2, 3)]
    runs = []
    for solver in (ds.NewtonDBConfig(num_iterations=30), ds.EigenConfig()):
        config = ds.RootInvShampooPreconditionerConfig(
            amortized_computation_config=solver,
            factor_matrix_dtype=torch.float64,
            inv_factor_matrix_dtype=torch.float64,
        )
        _log_second.cache_clear()
        with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
            optimizer, params = build(
                config,
                shapes=shapes,
                epsilon=1e-1,
                dtype=torch.float64,
                distributed_config=ds.SingleDeviceDistributedConfig(
                    target_parameter_dimensionality=math.inf
                ),
            )
        step(optimizer, params)
        runs.append(params)
    assert sorted({stack.root for stack in stacked(optimizer).layout.stacks}) == [4.0, 6.0, 8.0]
    logged = [r.getMessage() for r in caplog.records if "MinimaxConfig" in r.getMessage()]
    assert len(logged) == 1
    assert "NewtonDBConfig" in logged[0]
    for p, q in zip(*runs, strict=True):
        # The accuracy of minimax is 1.5 % for each of three factors; Newton-DB is exact here.
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.01)


def record_without(missing):
    block = SimpleNamespace(**{name: None for name in BLOCK_SEAMS if name != missing})
    names = {name: None for name in LIST_SEAMS if name != missing}
    if "_local_kronecker_factors_unwrapped" in names:
        names["_local_kronecker_factors_unwrapped"] = (block,)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("seam", [*LIST_SEAMS, *BLOCK_SEAMS])
def test_a_missing_seam_is_named(seam):
    assert missing_seam(record_without(seam), BLOCK_SEAMS) == f"SimpleNamespace.{seam}"


def test_the_base_has_every_seam():
    optimizer, _ = build(cls=ds.DistributedShampoo)
    lists = optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"]
    assert lists._local_kronecker_factors_unwrapped
    assert missing_seam(lists, BLOCK_SEAMS) is None


@pytest.mark.parametrize("where", ["list_seams", "block_seams"])
def test_without_a_seam_it_runs_block_by_block_and_says_so(where, monkeypatch, caplog):
    """The base is asked itself: for a name that it has not."""
    expected, expected_params = build(cls=ds.DistributedShampoo)
    step(expected, expected_params)
    names = getattr(StackedRootInvShampooPreconditionerList, where)
    wanted = (*names, "of_another_release")
    monkeypatch.setattr(StackedRootInvShampooPreconditionerList, where, wanted)
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        optimizer, params = build()
    assert ".of_another_release, which DashShampoo was tested with" in caplog.text
    assert "f606606" in caplog.text
    assert not isinstance(
        optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"],
        StackedRootInvShampooPreconditionerList,
    )
    step(optimizer, params)
    for p, q in zip(params, expected_params, strict=True):
        assert torch.equal(p, q)


def test_without_a_seam_a_solver_of_ours_is_refused(monkeypatch):
    monkeypatch.setattr(
        "dash_shampoo.preconditioners.choice.missing_seam", lambda *_: "TheList.seam"
    )
    config = ds.RootInvShampooPreconditionerConfig(amortized_computation_config=ds.NewtonDBConfig())
    with pytest.raises(RuntimeError, match=r"TheList\.seam.*NewtonDBConfig"):
        build(config, shapes=[(8, 8)])


def inaccurate(which):
    """A solve_stack that finds the roots of the matrices `which` inaccurate."""

    def solve(load, store, **settings):
        def without_them(rows, value, usable):
            for number in which:
                if rows.start <= number < rows.stop:
                    usable[number - rows.start] = False
            store(rows, value, usable)

        outcome = solve_stack(load, without_them, **settings)
        outcome.status[which] = int(InverseRootStatus.INACCURATE)
        return outcome

    return solve


def safe(policy="repair", **options):
    return ds.DashShampooPreconditionerConfig(
        amortized_computation_config=ds.CoupledNewtonConfig(),
        safety=ds.SafetyConfig(policy=policy, **options),
        use_symmetric_packing=False,
    )


def roots_of(optimizer):
    return [
        root.clone()
        for f in stacked(optimizer)._local_kronecker_factors_unwrapped
        for root in f.inv_factor_matrices
    ]


SQUARES = {"shapes": [(8, 8)] * 3, "epsilon": 1e-2}


def test_inaccurate_roots_are_redone_by_eigen_those_rows_alone(monkeypatch, caplog):
    sound, params = build(safe(), **SQUARES)
    step(sound, params)
    monkeypatch.setattr(SOLVE, inaccurate([1, 4]))
    repaired, params = build(safe(), **SQUARES)
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        step(repaired, params)
        step(repaired, params)
    assert repaired.failure_counts() == {"parameter 1": 4}
    assert len([r for r in caplog.records if "inaccurate" in r.message]) == 1
    step(sound, params)
    for expected, found in zip(roots_of(sound), roots_of(repaired), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_inaccurate_roots_keep_the_previous_root(monkeypatch):
    optimizer, params = build(safe("keep"), **SQUARES)
    step(optimizer, params)
    before = roots_of(optimizer)
    monkeypatch.setattr(SOLVE, inaccurate([0]))
    step(optimizer, params, seed=1)
    after = roots_of(optimizer)
    assert torch.equal(before[0], after[0])
    assert not any(torch.equal(b, a) for b, a in zip(before[1:], after[1:], strict=True))


def test_inaccurate_roots_can_raise_with_the_name_of_the_parameter(monkeypatch):
    monkeypatch.setattr(SOLVE, inaccurate([2]))
    optimizer, params = build(safe("raise"), **SQUARES)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ds.PreconditionerValueError, match="inaccurate"):
        step(optimizer, params)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_on_an_accelerator_outcomes_are_acted_on_at_the_next_refresh(monkeypatch):
    """Stood in for by the CPU: no status is read in the refresh that gave it."""
    as_an_accelerator(monkeypatch)
    monkeypatch.setattr(SOLVE, inaccurate([0]))
    optimizer, params = build(safe(), **SQUARES)
    identity = torch.eye(8)
    step(optimizer, params)
    assert torch.equal(roots_of(optimizer)[0], identity)
    assert stacked(optimizer).ledger.pending
    step(optimizer, params, seed=1)
    assert not torch.equal(roots_of(optimizer)[0], identity)
    assert optimizer.failure_counts() == {"parameter 0": 2}
    assert optimizer.failure_counts() == {"parameter 0": 2}


def test_on_an_accelerator_all_groups_are_settled_by_one_look(monkeypatch):
    as_an_accelerator(monkeypatch)
    looks = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: looks.append(tensor) or cpu(tensor))
    params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    optimizer = ds.DashShampoo([{"params": [p]} for p in params])
    step(optimizer, params)
    assert len(looks) == 1
    with pytest.raises(ds.PreconditionerValueError, match="parameter 1"):
        step(optimizer, params, spoil={1})
    assert len(looks) == 2
    step(optimizer, params, seed=1)
    assert all(torch.isfinite(p).all() for p in params)
    assert all(torch.isfinite(value).all() for value in every_tensor(optimizer))


def test_a_redone_root_is_damped_as_the_solver_damps():
    """One step of Newton-Schulz is off by far; its eigen substitute aims at the solver's own target."""
    solver = ds.NewtonSchulzRootInvConfig(coefficients=[[1.5, -0.5, 0.0]], relative_epsilon=1e-3)
    config = ds.DashShampooPreconditionerConfig(
        amortized_computation_config=solver, safety=ds.SafetyConfig(), use_symmetric_packing=False
    )
    optimizer, params = build(config, **SQUARES)
    step(optimizer, params)
    assert optimizer.failure_counts()
    for factors in stacked(optimizer)._local_kronecker_factors_unwrapped:
        for factor, root in zip(factors.factor_matrices, factors.inv_factor_matrices, strict=True):
            A = factor.double()
            A += max(1e-2, 1e-3 * float(A.norm())) * torch.eye(8)
            values, vectors = torch.linalg.eigh(A)
            torch.testing.assert_close(
                root.double(), vectors @ (values**-0.25).diag() @ vectors.T, rtol=1e-4, atol=1e-4
            )


def test_roots_can_be_refreshed_less_often_in_mid_training():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = ds.DashShampoo([parameter], precondition_frequency=2)
    for frequency in (2, 2, 5, 5):
        optimizer.param_groups[0]["precondition_frequency"] = frequency
        parameter.grad = torch.ones(4, 4)
        optimizer.step()
    assert parameter.isfinite().all()
    optimizer.param_groups[0]["start_preconditioning_step"] = 3
    with pytest.raises(ValueError, match="start_preconditioning_step of parameter group 0=3"):
        optimizer.step()
