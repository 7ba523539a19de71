"""Inverse roots of single matrices, and the packing of symmetric ones."""

from __future__ import annotations

import logging
from fractions import Fraction

import pytest
import torch

import dash_shampoo.base.embedded as embedded
from dash_shampoo.base import pack, unpack
from dash_shampoo.base.embedded.matrix_functions import matrix_inverse_root

EIGEN = embedded.EigenConfig()
AFTER = embedded.EigenConfig(
    rank_deficient_stability_config=embedded.PerturbationConfig(perturb_before_computation=False)
)
PSEUDO = embedded.EigenConfig(
    rank_deficient_stability_config=embedded.PseudoInverseConfig(rank_rtol=None)
)
NEWTON = embedded.CoupledNewtonConfig(tolerance=1e-12)
HIGHER = embedded.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0, tolerance=1e-14)

# Solver, roots, relative error at condition 1e4 in float64: eigh is backward stable (1e-16 times the
# condition), the coupled iterations lose about the square root of the condition more.
SOLVERS = [
    (EIGEN, (1, 2, 3, 4, 6, Fraction(10, 3)), 1e-11),
    (AFTER, (2, 4), 1e-11),
    (PSEUDO, (2, 4), 1e-11),
    (NEWTON, (1, 2, 3, 4, 6), 1e-9),
    (HIGHER, (1, 2, 3, 4, Fraction(10, 3)), 1e-9),
]


def matrix(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q @ torch.diag(eigenvalues) @ Q.T


@pytest.mark.parametrize(
    ("config", "root", "tolerance"),
    [(config, Fraction(root), tol) for config, roots, tol in SOLVERS for root in roots],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_root_is_the_root(config, root, tolerance, scale):
    eigenvalues = scale * torch.logspace(-4, 0, 12, dtype=torch.float64)
    A, expected = matrix(eigenvalues), matrix(eigenvalues ** (-1 / float(root)))
    kept = A.clone()
    R = matrix_inverse_root(A, root, config)
    assert torch.equal(A, kept)
    assert torch.linalg.norm(R - expected) <= tolerance * torch.linalg.norm(expected)


@pytest.mark.parametrize("config", [EIGEN, AFTER])
def test_singular_matrices_are_damped(config):
    A = matrix(torch.tensor([0.0, 0.0, 1.0, 4.0], dtype=torch.float64))
    R = matrix_inverse_root(A, Fraction(2), config, epsilon=1e-4)
    expected = torch.tensor([1 / 4.0001**0.5, 1 / 1.0001**0.5, 100.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(R), expected, rtol=1e-6, atol=0)


def test_indefinite_matrices_are_shifted():
    A = torch.diag(torch.tensor([-1.0, 3.0], dtype=torch.float64))
    R = matrix_inverse_root(A, Fraction(1), EIGEN, epsilon=0.5)
    torch.testing.assert_close(R.diagonal(), torch.tensor([2.0, 1 / 4.5], dtype=torch.float64))


def test_the_pseudo_inverse_drops_the_null_space():
    A = matrix(torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64))
    R = matrix_inverse_root(A, Fraction(2), PSEUDO)
    expected = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(R), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"epsilon=0.1: must be 0.0"):
        matrix_inverse_root(A, Fraction(2), PSEUDO, epsilon=0.1)


def test_a_failed_decomposition_is_repeated_in_double_precision(monkeypatch):
    original = torch.linalg.eigh

    def only_double(A):
        if A.dtype != torch.float64:
            raise torch.linalg.LinAlgError("did not converge")
        return original(A)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    A = matrix(torch.linspace(1, 2, 4, dtype=torch.float64)).float()
    assert matrix_inverse_root(A, Fraction(2), EIGEN).dtype == torch.float32
    with pytest.raises(torch.linalg.LinAlgError):
        matrix_inverse_root(A, Fraction(2), embedded.EigenConfig(retry_double_precision=False))


def test_a_cap_on_the_iterations_warns(caplog):
    caplog.set_level(logging.WARNING)
    A = matrix(torch.logspace(-8, 0, 6, dtype=torch.float64))
    matrix_inverse_root(A, Fraction(2), embedded.CoupledNewtonConfig(max_iterations=3))
    assert "max_iterations=3" in caplog.text


def test_the_higher_order_iteration_raises_where_it_is_inaccurate():
    A = matrix(torch.logspace(-12, 0, 8, dtype=torch.float64)).float()
    with pytest.raises(ArithmeticError, match=r"inaccurate|not finite"):
        matrix_inverse_root(A, Fraction(4), HIGHER)
    with pytest.raises(ArithmeticError, match="not finite"):
        matrix_inverse_root(torch.full((2, 2), float("inf")), Fraction(2), HIGHER)


def test_only_square_matrices_have_roots():
    with pytest.raises(ValueError, match=r"A.shape=\(2, 3\): must be a square matrix"):
        matrix_inverse_root(torch.ones(2, 3), Fraction(2), EIGEN)


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_packing_keeps_a_symmetric_matrix(size):
    A = torch.randn(size, size)
    A = A + A.T
    packed = pack(A)
    assert packed.shape == (size * (size + 1) // 2,)
    assert torch.equal(unpack(packed), A)
