"""`DashSOAPPreconditionerConfig`: its first step, its second moment, and whom it warns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import dash_shampoo as ds
from dash_shampoo.buckets.layout import ActiveStack
from dash_shampoo.eigenbasis import orthogonal_iteration
from dash_shampoo.preconditioners.eigenvalue_corrected import (
    StackedEigenvalueCorrectedShampooPreconditionerList,
)

SHAPE = (6, 5)


def build(config: object, **options: object) -> tuple[torch.nn.Parameter, ds.DashShampoo]:
    param = torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    settings = dict(lr=1.0, betas=(0.0, 0.9), epsilon=1e-8, max_preconditioner_dim=8)
    return param, ds.DashShampoo([param], preconditioner_config=config, **{**settings, **options})  # type: ignore[arg-type]


def config(cls: type = ds.DashSOAPPreconditionerConfig, **options: object) -> object:
    return cls(
        factor_matrix_dtype=torch.float64,
        factor_matrix_eigenvectors_dtype=torch.float64,
        corrected_eigenvalues_dtype=torch.float64,
        use_symmetric_packing=False,
        **options,
    )


def gradient(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(param: torch.nn.Parameter, optimizer: ds.DashShampoo, seed: int) -> Tensor:
    before = param.detach().clone()
    param.grad = gradient(seed)
    optimizer.step()
    return before - param.detach()


def lists(optimizer: ds.DashShampoo) -> object:
    return optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"]


def bases(optimizer: ds.DashShampoo) -> list[Tensor]:
    found = {stack.size: stack.data[0] for stack in lists(optimizer)._eigenvectors}  # type: ignore[attr-defined]
    return [found[size].clone() for size in SHAPE]


def test_the_first_step_gathers_a_basis_alone() -> None:
    param, optimizer = build(config())
    assert torch.equal(step(param, optimizer, 0), torch.zeros(SHAPE, dtype=torch.float64))
    G = gradient(0)
    for Q, F in zip(bases(optimizer), (G @ G.T, G.T @ G), strict=True):
        E = Q.T @ F @ Q
        assert torch.allclose(E, E.diag().diag(), atol=1e-10)
    Q0, Q1 = bases(optimizer)
    expected = 0.1 * Q0.square().T @ G.square() @ Q1.square()
    assert torch.allclose(lists(optimizer)._second_moments[0][0], expected)  # type: ignore[attr-defined]


def test_the_second_step_is_adam_s_in_the_basis() -> None:
    param, optimizer = build(config())
    step(param, optimizer, 0)
    before = lists(optimizer)._second_moments[0][0].clone()  # type: ignore[attr-defined]
    direction = step(param, optimizer, 1)
    Q0, Q1 = bases(optimizer)
    R = Q0.T @ gradient(1) @ Q1
    V = (0.9 * before + 0.1 * R.square()) / (1 - torch.tensor(0.9) ** 2)
    assert torch.allclose(direction, Q0 @ (R / (V.sqrt() + 1e-8)) @ Q1.T, rtol=1e-5)


def test_without_skipping_and_aligning_it_is_the_base_s_method() -> None:
    ours = config(
        amortized_computation_config=ds.EighEigendecompositionConfig(),
        skip_first_step=False,
        align_second_moment=False,
    )
    param, optimizer = build(ours)
    other, theirs = build(config(ds.EigenvalueCorrectedShampooPreconditionerConfig))
    for seed in range(8):
        step(param, optimizer, seed)
        step(other, theirs, seed)
    assert torch.equal(param, other)


@pytest.mark.parametrize("frequency", [1, 3])
def test_second_moments_are_carried_over_by_the_squares_of_the_change_of_basis(
    frequency: int,
) -> None:
    sorting = config(amortized_computation_config=ds.EighEigendecompositionConfig())
    param, optimizer = build(sorting, precondition_frequency=frequency)
    V = torch.zeros(SHAPE, dtype=torch.float64)
    Q = [torch.eye(n, dtype=torch.float64) for n in SHAPE]
    for seed in range(7):
        step(param, optimizer, seed)
        new = bases(optimizer)
        if seed == 0:
            V = 0.1 * gradient(seed).square()
        V = (Q[0].T @ new[0]).square().T @ V @ (Q[1].T @ new[1]).square()
        Q = new
        if seed > 0:
            V = 0.9 * V + 0.1 * (Q[0].T @ gradient(seed) @ Q[1]).square()
        assert torch.allclose(lists(optimizer)._second_moments[0][0], V, atol=1e-12)  # type: ignore[attr-defined]
    assert float(V.sum()) > 0.0


def test_a_following_basis_carries_over_once() -> None:
    """Before the first refresh the basis is the identity, and the second moment Adam's."""
    param, optimizer = build(config(), precondition_frequency=4)
    for seed in range(3):
        step(param, optimizer, seed)
    before = lists(optimizer)._second_moments[0][0].clone()  # type: ignore[attr-defined]
    step(param, optimizer, 3)
    Q0, Q1 = bases(optimizer)
    carried = Q0.square().T @ before @ Q1.square()
    expected = 0.9 * carried + 0.1 * (Q0.T @ gradient(3) @ Q1).square()
    assert torch.allclose(lists(optimizer)._second_moments[0][0], expected)  # type: ignore[attr-defined]
    assert lists(optimizer)._may_lack_basis == [False, False]  # type: ignore[attr-defined]


def test_the_first_refreshes_iterate_more(monkeypatch: pytest.MonkeyPatch) -> None:
    iterations: list[int] = []
    rotate = orthogonal_iteration._rotate

    def counting(*arguments: Any) -> tuple[Tensor, Tensor]:
        iterations.append(seed)
        return rotate(*arguments)

    monkeypatch.setattr(orthogonal_iteration, "_rotate", counting)
    param, optimizer = build(config(), precondition_frequency=2)
    for seed in range(26):
        step(param, optimizer, seed)
    of_a_refresh = [iterations.count(seed) for seed in range(1, 26, 2)]
    assert of_a_refresh == [8] * 10 + [2] * 3  # two factor matrices
    assert sum(of_a_refresh) == len(iterations)


@pytest.mark.parametrize("is_staggered", [True, False])
def test_second_moments_follow_the_bases_that_are_due_and_no_others(
    is_staggered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight blocks, two of another shape, and one without a gradient in the middle."""
    shapes = [(6, 5), (4, 4), (6, 5), (6, 5), (4, 4), (6, 5), (6, 5), (5,)]
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    preconditioner: Any = config(
        amortized_computation_config=ds.EighEigendecompositionConfig(),
        stagger_refresh=is_staggered,
    )
    optimizer = ds.DashShampoo(
        params,
        betas=(0.0, 0.9),
        epsilon=1e-8,
        max_preconditioner_dim=8,
        precondition_frequency=3,
        preconditioner_config=preconditioner,
    )
    compared: list[int] = []
    carry_over_ = StackedEigenvalueCorrectedShampooPreconditionerList._carry_over_

    def counting(self: Any, changed: Any, *arguments: Any) -> None:
        compared.append(len(changed.slots))
        carry_over_(self, changed, *arguments)

    monkeypatch.setattr(
        StackedEigenvalueCorrectedShampooPreconditionerList, "_carry_over_", counting
    )

    def states() -> list[tuple[Tensor, list[Tensor]]]:
        blocks: Any = lists(optimizer)._local_kronecker_factors_unwrapped  # type: ignore[attr-defined]
        return [
            (
                block.corrected_eigenvalues.clone(),
                [Q.clone() for Q in block.factor_matrices_eigenvectors],
            )
            for block in blocks
        ]

    generator, counts = torch.Generator().manual_seed(0), []
    for number in range(9):
        before, grads = states(), []
        for index, param in enumerate(params):
            grads.append(torch.randn(param.shape, dtype=torch.float64, generator=generator))
            param.grad = None if index == 3 else grads[-1]
        optimizer.step()
        counts.append(sum(compared))
        compared.clear()
        for index, (V, bases_before) in enumerate(before if number > 0 else []):
            new, bases_after = states()[index]
            if index == 3:
                assert torch.equal(new, V)
                continue
            G = grads[index]
            for dimension, (old, Q) in enumerate(zip(bases_before, bases_after, strict=True)):
                V = torch.tensordot(V, (old.T @ Q).square(), ([dimension], [0])).movedim(
                    -1, dimension
                )
                G = torch.tensordot(G, Q, ([dimension], [0])).movedim(-1, dimension)
            assert torch.allclose(new, 0.9 * V + 0.1 * G.square(), atol=1e-12)
    # 15 factor matrices, of which 13 have a gradient.
    # Shares are of about the same work, and the matrices of several sizes.
    assert counts == [0, 0, 13, *([4, 7, 2] if is_staggered else [0, 0, 13]) * 2]


def test_second_moments_follow_bases_that_are_computed_again() -> None:
    params = [torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64)) for _ in range(5)]
    optimizer = ds.DashShampoo(
        params,
        epsilon=1e-8,
        max_preconditioner_dim=8,
        preconditioner_config=config(),  # type: ignore[arg-type]
    )
    for seed in range(3):
        for index, param in enumerate(params):
            param.grad = gradient(10 * seed + index)
        optimizer.step()
    soap: Any = lists(optimizer)
    V, Q = (t.clone() for t in (soap._second_moments[0], soap._eigenvectors[0].data))
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    soap._eigenvectors[0].data[[1, 2, 4]] = Q[[1, 2, 4]] @ turn
    bad = ActiveStack(0, torch.tensor([1, 2, 4]), ((1, 0), (2, 0), (4, 0)))
    soap._compute_again(bad)
    new = soap._eigenvectors[0].data
    for index in range(5):
        expected = V[index]
        if index in (1, 2, 4):
            expected = ((Q[index] @ turn).T @ new[index]).square().T @ V[index]
            assert not torch.allclose(expected, V[index])
        assert torch.allclose(soap._second_moments[0][index], expected, atol=1e-12)


@pytest.mark.parametrize("safety", [None, ds.SafetyConfig()])
def test_a_lost_basis_is_found_again(safety: ds.SafetyConfig | None) -> None:
    param, optimizer = build(config(safety=safety))
    for seed in range(3):
        step(param, optimizer, seed)
    lists(optimizer)._eigenvectors[0].data.zero_()  # type: ignore[attr-defined]
    step(param, optimizer, 3)
    for Q in bases(optimizer):
        assert torch.allclose(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype), atol=1e-2)
    assert torch.isfinite(param).all()


def test_a_config_that_is_known_to_explode_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    qr = ds.QREigendecompositionConfig()
    base = config(
        ds.EigenvalueCorrectedShampooPreconditionerConfig, amortized_computation_config=qr
    )
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        param, optimizer = build(base)
        for seed in range(3):
            step(param, optimizer, seed)
    # Meta's package has warnings of its own.
    ours = [r.message for r in caplog.records if r.name.startswith("dash_shampoo")]
    assert [message.split(" is known")[0] for message in ours] == [
        "EigenvalueCorrectedShampooPreconditionerConfig with QREigendecompositionConfig"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        build(base, epsilon=1e-4)
        build(base, grafting_config=ds.AdamPreconditionerConfig())
        build(config(amortized_computation_config=qr))
        build(config(ds.EigenvalueCorrectedShampooPreconditionerConfig))
    assert not any("explode" in record.message for record in caplog.records)


def test_on_a_small_problem_it_descends_where_the_base_s_start_does_not() -> None:
    """Logistic regression of few inputs: the first gradient is of rank one."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 12, generator=generator)
    targets = (inputs @ torch.randn(12, 6, generator=generator)).argmax(1)

    def final_loss(preconditioner: object) -> float:
        model = torch.nn.Linear(12, 6)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = ds.DashShampoo(
            [model.weight],
            lr=0.1,
            betas=(0.9, 0.95),
            epsilon=1e-8,
            preconditioner_config=preconditioner,  # type: ignore[arg-type]
        )
        for step in range(60):
            batch = slice(step % 8 * 8, step % 8 * 8 + 8)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        return float(torch.nn.functional.cross_entropy(model(inputs), targets))

    base = ds.EigenvalueCorrectedShampooPreconditionerConfig
    assert final_loss(ds.DefaultDashSOAPConfig) < 0.3
    assert final_loss(base()) > 3.0
    assert final_loss(base(amortized_computation_config=ds.QREigendecompositionConfig())) > 30.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_workspace_bytes": 0}, "max_workspace_bytes=0")],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds.DashSOAPPreconditionerConfig(**options)  # type: ignore[arg-type]


def test_a_failed_eigendecomposition_is_named_and_the_previous_basis_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eigh = config(
        ds.EigenvalueCorrectedShampooPreconditionerConfig,
        num_tolerated_failed_amortized_computations=1,
    )
    param, optimizer = build(eigh)
    step(param, optimizer, 0)
    before = bases(optimizer)

    def failing(A: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        step(param, optimizer, 1)
    assert (
        "Eigenvectors of factor matrix 0.block_0.0 of parameter 0: the solver failed" in caplog.text
    )
    assert "The previous eigenvectors stay in use" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, bases(optimizer), strict=True))
    assert optimizer.failure_counts() == {"parameter 0": 2}
    with pytest.raises(ValueError, match="2 times in a row"):
        step(param, optimizer, 2)
