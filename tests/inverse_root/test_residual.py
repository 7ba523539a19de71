"""The sketched residual: what it finds, what it cannot know, and that it draws nothing global."""

from fractions import Fraction

import pytest
import torch

import dash_shampoo as ds
from benchmarks.device_counts import DeviceCounts
from dash_shampoo.inverse_root import InverseRootStatus, inverse_root, sketched_residual
from dash_shampoo.products import is_tf32_allowed


def stack(count=6, size=32, seed=0):
    factor = torch.randn(
        count, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return factor @ factor.mT / size


def exact(A, root, damping=0.0):
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values + damping).pow(-1.0 / float(root))[:, None, :]) @ vectors.mT


@pytest.mark.parametrize(
    "root", [Fraction(1), Fraction(2), Fraction(3), Fraction(4), Fraction(8), Fraction(10, 3)]
)
def test_zero_for_the_root_and_large_for_a_wrong_one(root):
    A = stack()
    damping = torch.full((6,), 1e-2, dtype=torch.float64)
    X = exact(A, root, 1e-2)
    assert sketched_residual(A, X, root, damping).max() < 1e-10
    assert sketched_residual(A, 1.5 * X, root, damping).min() > 0.3
    assert sketched_residual(A, exact(A, 2 * root, 1e-2), root, damping).min() > 0.3


def test_roots_of_many_applications_are_unknown():
    A = stack()
    assert (
        sketched_residual(A, A, Fraction(100, 3), torch.zeros(6, dtype=torch.float64)).isnan().all()
    )


def test_it_is_the_same_every_time_and_leaves_the_generator_alone():
    A = stack()
    state = torch.get_rng_state()
    first = sketched_residual(A, A, Fraction(2), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(
        first, sketched_residual(A, A, Fraction(2), torch.zeros(6, dtype=torch.float64))
    )
    assert torch.equal(state, torch.get_rng_state())


def test_inverse_root_marks_what_is_above_the_threshold_and_nothing_else():
    A = stack()
    A[2] = torch.diag(torch.logspace(0, -9, 32, dtype=torch.float64))  # ten steps don't get there
    config = ds.NewtonDBConfig()
    result = inverse_root(A, 4, config, epsilon=1e-12, residual_threshold=0.3)
    assert result.status[2] == InverseRootStatus.INACCURATE
    marked = result.status == InverseRootStatus.INACCURATE
    assert torch.equal(marked, result.residual > 0.3)
    untested = inverse_root(A, 4, config, epsilon=1e-12)
    assert torch.equal(untested.value, result.value)
    assert not untested.status.any()


def test_eigen_is_not_tested():
    A = torch.diag(torch.logspace(0, -30, 32))[None]
    result = inverse_root(A, 4, ds.EigenConfig(), epsilon=1e-20, residual_threshold=1e-6)
    assert result.status.tolist() == [InverseRootStatus.SUCCESS]


def test_a_threshold_of_zero_is_refused():
    with pytest.raises(ValueError, match="residual_threshold"):
        inverse_root(stack(), 2, residual_threshold=0.0)


@pytest.mark.parametrize(
    ("config", "epsilon"),
    [
        (ds.EigenConfig(), 0.1),
        (ds.CoupledNewtonConfig(), 0.1),
        (ds.NewtonDBConfig(num_iterations=30), 0.1),
        (ds.CoupledHigherOrderConfig(rel_epsilon=0.05, abs_epsilon=0.0), 0.7),
        (ds.ChebyshevConfig(degree=100, relative_epsilon=0.1), 0.1),
    ],
)
def test_the_damping_is_what_the_value_aims_at(config, epsilon):
    A = stack()
    result = inverse_root(A, 2, config, epsilon)
    for index in range(len(A)):
        expected = exact(A[index : index + 1], 2, float(result.damping[index]))
        torch.testing.assert_close(result.value[index : index + 1], expected, rtol=1e-4, atol=1e-4)


def test_a_root_whose_products_overflow_is_not_unknown():
    """inf - inf would be NaN, which is not above any threshold."""
    A = torch.eye(16)[None]
    huge = 1e30 * torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    broken = torch.full((1, 16, 16), torch.nan)
    for X in (huge, broken):
        assert sketched_residual(A, X, Fraction(4), torch.zeros(1)).isposinf().all()


def test_the_residual_is_in_fp32_whatever_the_program_allows(monkeypatch):
    A, allowed, multiply = torch.eye(8).expand(2, 8, 8).contiguous(), [], torch.bmm

    def bmm(*arguments, **named):
        allowed.append(is_tf32_allowed())
        return multiply(*arguments, **named)

    monkeypatch.setattr(torch, "bmm", bmm)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert is_tf32_allowed()
        with DeviceCounts({}, default="") as device:
            device.place([A])
            sketched_residual(A, A, Fraction(4), torch.zeros(2))
        assert is_tf32_allowed()
    finally:
        torch.set_float32_matmul_precision(before)
    assert allowed == [False] * 5
