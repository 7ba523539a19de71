"""Scales: never below where they promise, safe at zero and at the ends of float32, no shared randomness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_shampoo.inverse_root import FrobeniusScaling, PowerIterationScaling
from dash_shampoo.inverse_root.scaling import compute_scale
from tests.reference.inverse_root import random_spd

SCALINGS = [
    FrobeniusScaling(),
    PowerIterationScaling(),
    PowerIterationScaling(num_vectors=16),
    PowerIterationScaling(matmul_precision="bf16"),
    PowerIterationScaling(num_vectors=16, matmul_precision="fp16", num_iterations=5),
]
each_scaling = pytest.mark.parametrize("config", SCALINGS, ids=str)


def _scale(A: torch.Tensor, config) -> torch.Tensor:
    return compute_scale(A, config)


@each_scaling
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([2, 7, 32]),
    condition=st.sampled_from([1.0, 1e3]),
)
def test_the_scale_is_above_lambda_max(config, seed: int, size: int, condition: float) -> None:
    """λ_max of the test matrices is 1. Frobenius is a bound; 2× a power iteration was never below."""
    A = random_spd(4, size, condition, torch.Generator().manual_seed(seed)).float()
    s = _scale(A, config)
    upper = size**0.5 if isinstance(config, FrobeniusScaling) else config.safety_factor * 1.01
    assert float(s.min()) >= 1.0 - 1e-6
    assert float(s.max()) <= upper + 1e-5


@pytest.mark.parametrize("num_vectors", [1, 16])
def test_power_iteration_converges_to_lambda_max(num_vectors: int) -> None:
    A = torch.diag(torch.tensor([5.0, 1.0, 0.5, 0.1], dtype=torch.float64))[None]
    config = PowerIterationScaling(num_vectors=num_vectors, safety_factor=1.0, num_iterations=10)
    assert abs(float(_scale(A, config)) - 5.0) < 1e-6


def test_more_vectors_never_estimate_less_with_the_same_first_ones() -> None:
    """The paper's 16 vectors guard against one start vector that misses the leading eigenvector."""
    generator = torch.Generator().manual_seed(0)
    A = random_spd(50, 24, 3.0, generator)
    few, many = (_scale(A, PowerIterationScaling(num_vectors=k, num_iterations=3)) for k in (1, 16))
    assert float(many.mean()) > float(few.mean())
    assert bool((many <= 2.0 + 1e-12).all())


@each_scaling
def test_zero_blocks_have_scale_one(config) -> None:
    A = torch.stack((torch.zeros(5, 5), torch.eye(5), torch.full((5, 5), 1e-45)))
    s = _scale(A, config)
    assert s[0] == 1.0
    assert s[1] > 0.99
    assert s[2] == 1.0, "below the smallest normal number 1/s overflows"


@each_scaling
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_extreme_entries_neither_overflow_nor_vanish(config, factor: float) -> None:
    A = random_spd(3, 12, 10.0, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(
        _scale(A * factor, config), _scale(A, config) * factor, rtol=2e-3, atol=0.0
    )


@each_scaling
def test_the_global_generator_is_left_alone_and_the_scale_does_not_depend_on_it(config) -> None:
    A = random_spd(3, 12, 10.0, torch.Generator().manual_seed(0)).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _scale(A, config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(_scale(A, config), first)
    assert torch.equal(_scale(A[1:2], config), first[1:2]), "a block's scale is its own"


@each_scaling
@pytest.mark.parametrize("epsilon", [1e-6, 0.5, 100.0])
def test_damping_is_part_of_the_scale(config, epsilon: float) -> None:
    A = random_spd(3, 12, 10.0, torch.Generator().manual_seed(0))
    if isinstance(config, FrobeniusScaling):
        expected = torch.linalg.matrix_norm(A + epsilon * torch.eye(12, dtype=A.dtype))
        torch.testing.assert_close(compute_scale(A, config, epsilon), expected)
    else:  # λ_max is 1; ten power iterations end a few percent below it
        expected = torch.full((3,), config.safety_factor * (1.0 + epsilon), dtype=A.dtype)
        torch.testing.assert_close(compute_scale(A, config, epsilon), expected, rtol=5e-2, atol=0.0)


@each_scaling
def test_a_matrix_that_is_not_finite_has_no_scale(config) -> None:
    A = torch.eye(4).repeat(3, 1, 1)
    A[0, 1, 2], A[1, 0, 0] = torch.inf, torch.nan
    assert compute_scale(A, config).isnan().tolist() == [True, True, False]
