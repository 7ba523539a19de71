"""Numeric tests of every solver of the table: accuracy, identities, isolation of blocks, extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_shampoo.inverse_root import InverseRootResult, InverseRootStatus, inverse_root
from tests.inverse_root.solver_table import SOLVERS, Row
from tests.reference.inverse_root import random_orthogonal, random_spd, relative_error

DTYPES = (torch.float32, torch.float64)
each_row = pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)
few_examples = settings(max_examples=4, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
# MKL sums in another order for a matrix that is not aligned to 16 bytes, so with an odd size the
# last digit depends on a block's place in memory; bitwise claims are made for even sizes.
even_sizes = st.sampled_from([2, 4, 6, 16, 34])
sizes = st.sampled_from([1, 2, 3, 5, 16, 33])


def _stack(row: Row, seed: int, num_blocks: int, size: int, dtype: torch.dtype, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return random_spd(num_blocks, size, row.condition, generator, scale).to(dtype)


def test_the_table_is_not_empty_and_names_are_unique() -> None:
    names = [row.name for row in SOLVERS]
    assert len(names) >= 15
    assert len(set(names)) == len(names)
    assert all(row.why for row in SOLVERS)


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_roots_agree_with_the_reference(row: Row, dtype: torch.dtype) -> None:
    for root in row.roots:
        for size in (1, 5, 24):
            A = _stack(row, seed=size, num_blocks=4, size=size, dtype=dtype, scale=3.0)
            result = inverse_root(A, root, row.config)
            assert relative_error(result.value, row.reference(A, root)) <= row.tolerance(dtype)
            assert result.value.dtype == dtype
            assert bool(result.is_usable.all())


@each_row
@few_examples
@given(seed=seeds, size=sizes, exponent=st.integers(-20, 20))
def test_scaling_the_matrix_scales_the_root(row: Row, seed: int, size: int, exponent: int) -> None:
    """f(cA) = c^(-1/p) f(A): also shows that the result is the true root, not a multiple of it."""
    if not row.is_scale_free:
        return
    A = _stack(row, seed, 2, size, torch.float32)
    c = 10.0**exponent
    for root in row.roots:
        scaled = inverse_root(A * c, root, row.config).value.double() * c ** (1.0 / root)
        plain = inverse_root(A, root, row.config).value.double()
        assert relative_error(scaled, plain) <= 2 * row.float32


@each_row
@few_examples
@given(seed=seeds, size=sizes)
def test_rotating_the_matrix_rotates_the_root(row: Row, seed: int, size: int) -> None:
    """f(QAQᵀ) = Q f(A) Qᵀ."""
    A = _stack(row, seed, 3, size, torch.float64)
    Q = random_orthogonal(3, size, torch.Generator().manual_seed(seed + 1))
    rotated = Q @ A @ Q.mT
    root = row.roots[0]
    value = inverse_root((rotated + rotated.mT) / 2, root, row.config).value
    assert (
        relative_error(value, Q @ inverse_root(A, root, row.config).value @ Q.mT) <= 2 * row.float64
    )


@each_row
@few_examples
@given(seed=seeds, size=even_sizes)
def test_permuting_the_blocks_permutes_the_result(row: Row, seed: int, size: int) -> None:
    A = _stack(row, seed, 7, size, torch.float32)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    for root in row.roots:
        result = inverse_root(A, root, row.config)
        permuted = inverse_root(A[order], root, row.config)
        assert torch.equal(permuted.value, result.value[order])
        assert torch.equal(permuted.iterations, result.iterations[order])
        assert torch.equal(permuted.status, result.status[order])


@each_row
@few_examples
@given(seed=seeds, size=sizes, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_bad_block_leaves_the_others_bit_identical(
    row: Row, seed: int, size: int, bad: float
) -> None:
    for dtype in DTYPES:
        A = _stack(row, seed, 6, size, dtype)
        # Different conditions, so that blocks finish at different steps where there is a stopping rule.
        A[1::2] += torch.eye(size, dtype=dtype)
        poisoned = A.clone()
        poisoned[2, 0, size - 1] = bad
        for root in row.roots:
            expected = inverse_root(A, root, row.config)
            result = inverse_root(poisoned, root, row.config)
            others = torch.arange(6) != 2
            assert torch.equal(result.value[others], expected.value[others])
            assert torch.equal(result.status[others], expected.status[others])
            assert result.status[2] == InverseRootStatus.NON_FINITE_INPUT
            assert bool(result.value[2].isnan().all())


@each_row
def test_each_block_is_solved_as_if_alone(row: Row) -> None:
    A = _stack(row, 0, 9, 16, torch.float32)
    A[::3] += torch.eye(16)
    for root in row.roots:
        together = inverse_root(A, root, row.config)
        alone = [inverse_root(block, root, row.config) for block in A]
        assert torch.equal(together.iterations, torch.cat([result.iterations for result in alone]))
        assert torch.equal(together.value, torch.stack([result.value for result in alone]))


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_and_multiples_of_it(row: Row, dtype: torch.dtype) -> None:
    """f(I) = I, where the solver adds no damping of its own."""
    for c in (1.0, 16.0):
        A = c * torch.eye(8, dtype=dtype).expand(2, 8, 8)
        for root in row.roots:
            value = inverse_root(A, root, row.config).value
            assert relative_error(value, row.reference(A, root)) <= row.tolerance(dtype)


@each_row
@few_examples
@given(seed=seeds, size=sizes)
def test_symmetric_in_symmetric_out(row: Row, seed: int, size: int) -> None:
    A = _stack(row, seed, 3, size, torch.float32)
    for root in row.roots:
        value = inverse_root(A, root, row.config).value
        assert relative_error(value.mT, value.double()) <= row.float32


@each_row
@few_examples
@given(seed=seeds, size=sizes)
def test_the_fourth_root_squared_is_the_square_root(row: Row, seed: int, size: int) -> None:
    if not {2, 4} <= set(row.roots):
        return
    A = _stack(row, seed, 3, size, torch.float64)
    fourth, square = (inverse_root(A, root, row.config).value for root in (4, 2))
    assert relative_error(fourth @ fourth, square) <= 3 * row.float64


@each_row
def test_the_input_and_the_global_generator_are_left_alone(row: Row) -> None:
    A = _stack(row, 0, 3, 8, torch.float32)
    A[1, 0, 0] = torch.nan
    before, state = A.clone(), torch.get_rng_state()
    A.requires_grad_()
    for root in row.roots:
        result = inverse_root(A, root, row.config, epsilon=1e-3)
        assert not result.value.requires_grad
        assert result.value.data_ptr() != A.data_ptr()
    assert torch.equal(A.detach().nan_to_num(7.0), before.nan_to_num(7.0))
    assert torch.equal(torch.get_rng_state(), state)


@each_row
def test_results_are_deterministic(row: Row) -> None:
    A = _stack(row, 3, 5, 12, torch.float32)
    first, second = (inverse_root(A, row.roots[0], row.config) for _ in range(2))
    assert torch.equal(first.value, second.value)


@each_row
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_in_float32(row: Row, scale: float) -> None:
    """Squares of such entries overflow or vanish in float32; the roots don't."""
    A = _stack(row, 0, 3, 12, torch.float32)
    for root in row.roots:
        result = inverse_root(A * scale, root, row.config)
        if not row.is_scale_free:
            assert _is_honest(result)
            continue
        expected = row.reference(A, root) * float(scale) ** (-1.0 / root)
        assert bool(result.is_usable.all())
        assert relative_error(result.value, expected) <= 2 * row.float32


def _is_honest(result: InverseRootResult) -> bool:
    """Whether every block that is said to be usable is finite."""
    return bool(torch.isfinite(result.value[result.is_usable]).all())


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
def test_singular_blocks_give_finite_roots_or_a_status(
    row: Row, dtype: torch.dtype, epsilon: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    low = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    blocks = [
        torch.zeros(12, 12),
        v @ v.T,
        v @ v.T * 1e30,
        v @ v.T * 1e-30,
        low @ low.T,
        -torch.eye(12),
    ]
    A = torch.stack([block.to(dtype) for block in blocks])
    for root in row.roots:
        result = inverse_root(A, root, row.config, epsilon)
        assert _is_honest(result)
        if row.finite_at_zero:
            assert bool(result.is_usable[0])


@each_row
def test_epsilon_damps(row: Row) -> None:
    """epsilon·I is added to A, absolutely."""
    if not row.adds_epsilon:
        return  # the repairs of the spectrum and the higher-order solver have tests of their own
    A = _stack(row, 0, 3, 8, torch.float64)
    for root in row.roots:
        value = inverse_root(A, root, row.config, epsilon=0.5).value
        expected = row.reference(A + 0.5 * torch.eye(8, dtype=torch.float64), root)
        assert relative_error(value, expected) <= row.float64


@each_row
def test_solvers_of_fixed_steps_never_look_at_values(row: Row) -> None:
    """On the meta device there are no values: reading one, which on a GPU would wait for it, raises."""
    if not row.is_free_of_syncs:
        return
    A = torch.empty(3, 8, 8, device="meta")
    for root in row.roots:
        result = inverse_root(A, root, row.config, epsilon=1e-3)
        assert result.value.shape == A.shape


def test_some_solvers_are_free_of_syncs_and_some_are_not() -> None:
    assert len({row.is_free_of_syncs for row in SOLVERS}) == 2
