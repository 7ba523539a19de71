"""Repairs of single blocks: the damping is kept, whatever the matrix is."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from dash_shampoo.base import CoupledNewtonConfig, EigenConfig
from dash_shampoo.inverse_root import (
    InverseRootStatus,
    MinimaxConfig,
    NewtonDBConfig,
    NewtonSchulzRootInvConfig,
    inverse_root,
    repair,
)
from dash_shampoo.inverse_root.registry import find_solver
from tests.reference.inverse_root import random_orthogonal, random_spd

CONFIGS = [
    MinimaxConfig(),
    MinimaxConfig(num_squarings=5),
    NewtonDBConfig(),
    NewtonSchulzRootInvConfig(),
    CoupledNewtonConfig(max_iterations=15),
    EigenConfig(),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}")


def _with_eigenvalues(*spectra: torch.Tensor) -> torch.Tensor:
    Q = random_orthogonal(len(spectra), len(spectra[0]), torch.Generator().manual_seed(0))
    L = torch.stack(spectra).double()
    A = (Q * L[:, None, :]) @ Q.mT
    return ((A + A.mT) / 2).float()


@each_config
@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("lowest", [-1e-6, -1e-4, -1e-3, -1e-2, -0.1, -1.0])
def test_an_indefinite_matrix_keeps_the_damped_bound(config, root: int, lowest: float) -> None:
    """The base's perturbation would shift the spectrum to λ_min = ε, and invert that."""
    spectrum = torch.logspace(0, -6, 24)
    damping = torch.full((3,), 1e-4)
    A = _with_eigenvalues(spectrum, spectrum, spectrum)
    values, vectors = torch.linalg.eigh(A.double())
    values[1, 0], values[2, :3] = lowest, lowest
    A = ((vectors * values[:, None, :]) @ vectors.mT).float()
    result = repair(A, root, config, 1e-12, damping)
    assert result.status.tolist() == [InverseRootStatus.SUCCESS] * 3
    eigenvalues = torch.linalg.eigvalsh(result.value.double())
    assert float(eigenvalues.max()) <= 1.01 * 1e-4 ** (-1.0 / root)
    # And the leading direction, which was never in doubt, has its root.
    leading = vectors[:, :, -1:]
    found = (leading.mT @ result.value.double() @ leading).flatten()
    assert bool(((found - 1.0).abs() < 0.45).all())


@each_config
def test_a_definite_matrix_gets_a_good_root_at_more_damping(config) -> None:
    A = random_spd(4, 16, 1e3, torch.Generator().manual_seed(0)).float()
    result = repair(A, 2, config, 0.0, torch.full((4,), 1e-4))
    assert not result.status.any()
    assert bool((result.damping >= 1e-4).all())
    values, vectors = torch.linalg.eigh(A.double())
    expected = (vectors * (values + result.damping[:, None]).rsqrt()[:, None, :]) @ vectors.mT
    error = (result.value - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    promised = find_solver(config).error(config, Fraction(2))
    assert float(error.max()) < max(promised, 0.25), "a residual of 0.3 hides no more than that"


def test_what_can_not_be_repaired_is_said_to_be_so() -> None:
    A = torch.stack((torch.eye(4), torch.full((4, 4), torch.nan), torch.zeros(4, 4), -torch.eye(4)))
    result = repair(A, 2, MinimaxConfig(), 0.0, torch.tensor([1e-4, torch.nan, 0.0, 1e-4]))
    assert result.status.tolist()[:2] == [
        InverseRootStatus.SUCCESS,
        InverseRootStatus.NON_FINITE_INPUT,
    ]
    assert bool(result.value[1].isnan().all())
    assert bool(result.value[result.is_usable].isfinite().all())
    assert float(result.value[3].abs().max()) <= 1.01e2


def test_eigendecompositions_are_for_the_last_few_alone(monkeypatch) -> None:
    """On a GPU each of them is a loop."""
    calls: list[int] = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: (calls.append(len(A)), real(A))[1])
    A = random_spd(6, 16, 1e3, torch.Generator().manual_seed(0)).float()
    repair(A, 2, MinimaxConfig(), 0.0, torch.full((6,), 1e-4))
    assert calls == []
    A[2] -= 0.5 * torch.eye(16)
    repair(A, 2, MinimaxConfig(), 0.0, torch.full((6,), 1e-4))
    assert calls == [1]


def test_a_good_block_s_repair_does_not_depend_on_the_others() -> None:
    A = random_spd(3, 16, 1e3, torch.Generator().manual_seed(0)).float()
    damping = torch.full((3,), 1e-4)
    expected = repair(A[:1], 2, MinimaxConfig(), 0.0, damping[:1]).value[0]
    A[1], A[2] = torch.nan, -A[2]
    assert torch.equal(repair(A, 2, MinimaxConfig(), 0.0, damping).value[0], expected)
    assert torch.equal(
        inverse_root(A[:1], 2, MinimaxConfig()).status, torch.zeros(1, dtype=torch.uint8)
    )
