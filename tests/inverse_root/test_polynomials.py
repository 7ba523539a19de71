"""Newton-DB and Chebyshev beyond accuracy: the measured behaviour that users choose them for."""

from __future__ import annotations

import math

import pytest
import torch

from dash_shampoo.base import CoupledNewtonConfig
from dash_shampoo.inverse_root import (
    ChebyshevConfig,
    NewtonDBConfig,
    PowerIterationScaling,
    check_supported,
    inverse_root,
)
from dash_shampoo.inverse_root.chebyshev import (
    chebyshev_sum,
    fewest_baby_steps,
    fit_error,
    fit_inverse_root,
    split_coefficients,
)
from dash_shampoo.products import Products
from tests.reference.inverse_root import random_spd


def _on_spectrum(relative: torch.Tensor, root: int, config) -> torch.Tensor:
    """f(x)·s^(1/p) on a diagonal float64 matrix with these eigenvalues relative to its norm s."""
    filler = (1.0 - relative.square().sum()).sqrt()
    x = torch.cat((relative, filler[None]))
    value = inverse_root(torch.diag(x)[None], root, config).value[0].diagonal()[:-1]
    assert abs(float(torch.linalg.vector_norm(x)) - 1.0) < 1e-12
    return value


RELATIVE = torch.logspace(-9, -1, 400, dtype=torch.float64) / 30


def test_one_pass_of_newton_db_is_a_damping() -> None:
    """Ten steps, p = 2: within 10 % of (A + 2.5e-4·s·I)^(-1/2)."""
    ratio = _on_spectrum(RELATIVE, 2, NewtonDBConfig()) * (RELATIVE + 2.5e-4).sqrt()
    assert float((ratio - 1).abs().max()) < 0.1


def test_two_passes_of_newton_db_over_invert() -> None:
    """p = 4: up to 2.18 times the true root for eigenvalues between about 1e-7 and 1e-3 of s."""
    ratio = _on_spectrum(RELATIVE, 4, NewtonDBConfig()) * RELATIVE.pow(0.25)
    assert float(ratio.max()) == pytest.approx(2.18, abs=0.02)
    inside = (RELATIVE > 2e-7) & (RELATIVE < 5e-4)
    assert bool((ratio[inside] > 1.0).all())


def test_ten_steps_of_coupled_newton_are_a_damping() -> None:
    """p = 4: within 4.4 % of the damping 4.5e-5·s."""
    config = CoupledNewtonConfig(max_iterations=10)
    ratio = _on_spectrum(RELATIVE, 4, config) * (RELATIVE + 4.5e-5).pow(0.25)
    assert float((ratio - 1).abs().max()) < 0.046


def test_newton_db_stays_finite_on_ill_conditioned_factors() -> None:
    A = random_spd(4, 32, 1e8, torch.Generator().manual_seed(0)).float()
    for root in (2, 4, 8):
        for scaling in (NewtonDBConfig().scaling, PowerIterationScaling()):
            result = inverse_root(A, root, NewtonDBConfig(scaling=scaling))
            assert result.status.tolist() == [0] * 4


def _chebyshev_sum(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    theta = torch.arccos(x.clamp(-1.0, 1.0))
    return sum(c * torch.cos(k * theta) for k, c in enumerate(coefficients))  # type: ignore[return-value]


@pytest.mark.parametrize("degree", [*range(1, 18), 40, 61])
def test_both_evaluations_are_the_polynomial(degree: int) -> None:
    generator = torch.Generator().manual_seed(degree)
    coefficients = tuple(torch.randn(degree + 1, generator=generator, dtype=torch.float64).tolist())
    x = torch.rand(2, 6, generator=generator, dtype=torch.float64) * 2 - 1
    S = torch.diag_embed(x)
    expected = torch.diag_embed(_chebyshev_sum(x, coefficients))
    for num_baby_steps in (1, fewest_baby_steps(degree)):
        before = S.clone()
        value = chebyshev_sum(S, coefficients, Products("fp32"), num_baby_steps)
        torch.testing.assert_close(value, expected, rtol=0.0, atol=1e-11 * degree)
        assert torch.equal(S, before)


@pytest.mark.parametrize(
    ("root", "degree", "delta"), [(2.0, 30, 0.1), (4.0, 30, 0.1), (10 / 3, 60, 0.02)]
)
def test_the_fit_converges_geometrically(root: float, degree: int, delta: float) -> None:
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    target = (x + delta).pow(-1.0 / root)
    rho = 1 + 2 * delta + 2 * math.sqrt(delta * (1 + delta))
    coefficients = fit_inverse_root(root, degree, delta, 10_000)
    error = (_chebyshev_sum(2 * x - 1, coefficients) - target).abs().max()
    assert float(error) < 10 * rho**-degree


def test_the_fit_agrees_with_numpys() -> None:
    """The paper's setting: N = 10,000 nodes, [1e-10, 1 + 1e-10]."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    f = lambda t: ((t + 1) / 2 + 1e-10) ** -0.25  # noqa: E731
    nodes = numpy.cos(numpy.pi * (numpy.arange(10_000) + 0.5) / 10_000)
    expected = numpy.polynomial.chebyshev.chebfit(nodes, f(nodes), 60)
    coefficients = numpy.array(fit_inverse_root(4.0, 60, 1e-10, 10_000))
    assert numpy.abs(coefficients - expected).max() < 1e-6


@pytest.mark.parametrize("degree", [1, 2, 3, 7, 20, 60, 199])
def test_splitting_keeps_the_polynomial_and_its_size(degree: int) -> None:
    generator = torch.Generator().manual_seed(degree)
    coefficients = tuple(torch.randn(degree + 1, generator=generator, dtype=torch.float64).tolist())
    size = fewest_baby_steps(degree)
    groups = split_coefficients(coefficients, size)
    assert all(len(group) == size for group in groups)
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    theta = torch.arccos(x)
    value = sum(
        torch.cos(i * size * theta) * _chebyshev_sum(x, group) for i, group in enumerate(groups)
    )
    torch.testing.assert_close(value, _chebyshev_sum(x, coefficients), rtol=0.0, atol=1e-10)


def test_chebyshev_returns_the_true_root_not_that_of_the_scaled_matrix() -> None:
    """The reference omits s^(-1/p)."""
    A = 1e4 * torch.eye(4, dtype=torch.float64)[None]
    value = inverse_root(A, 4, ChebyshevConfig(degree=60, relative_epsilon=1e-2)).value
    assert float((value - 0.1 * torch.eye(4)).abs().max()) < 1e-3


def test_a_polynomial_that_misses_its_target_is_warned_of_once(caplog) -> None:
    """The paper's 1e-10 serves root 4, but with root 2 the fit is off by 4 times everywhere."""
    bad, fine = ChebyshevConfig(degree=59), ChebyshevConfig(degree=59, relative_epsilon=1e-3)
    with caplog.at_level("WARNING", logger="dash_shampoo"):
        check_supported(fine, 2)
        check_supported(bad, 4)
        assert not caplog.records
        for _ in range(3):
            check_supported(bad, 2)
    assert len(caplog.records) == 1
    assert "relative_epsilon" in caplog.text


@pytest.mark.parametrize(("relative_epsilon", "error"), [(1e-2, 2e-6), (1e-3, 0.01), (1e-4, 0.21)])
def test_the_errors_that_the_config_promises(relative_epsilon: float, error: float) -> None:
    for root in (2.0, 4.0):
        assert fit_error(root, 60, relative_epsilon, 10_000) < error
