"""The eigen solver: failures of single blocks, repairs of the spectrum, pseudo-inverse."""

from __future__ import annotations

import pytest
import torch

from dash_shampoo.base import EigenConfig, PerturbationConfig, PseudoInverseConfig
from dash_shampoo.inverse_root import InverseRootStatus, SpectrumRepairConfig, inverse_root
from dash_shampoo.inverse_root.eigen import _eigh_on_threads
from tests.reference.inverse_root import random_orthogonal, random_spd, relative_error

REAL_EIGH = torch.linalg.eigh
MARK = 123.0  # A[0, 0] of a block on which the patched eigh fails


def _failing_eigh(fails_in: set[torch.dtype], calls: list[int]):
    def eigh(A: torch.Tensor):
        calls.append(A.shape[0])
        if A.dtype in fails_in and bool((A[..., 0, 0] == MARK).any()):
            raise torch._C._LinAlgError("linalg.eigh: the algorithm failed to converge")
        return REAL_EIGH(A)

    return eigh


def _marked_stack(num_blocks: int, bad: list[int], size: int = 6) -> torch.Tensor:
    A = random_spd(num_blocks, size, 10.0, torch.Generator().manual_seed(0)).float()
    A[bad, 0, 0] = MARK
    return A


@pytest.mark.parametrize("bad", [[0], [3], [6], [1, 2], [0, 3, 6], list(range(7))])
def test_a_block_that_fails_is_retried_in_float64_and_alone(monkeypatch, bad: list[int]) -> None:
    A = _marked_stack(7, bad)
    expected = inverse_root(A, 4)
    calls: list[int] = []
    monkeypatch.setattr(torch.linalg, "eigh", _failing_eigh({torch.float32}, calls))
    result = inverse_root(A, 4)
    assert result.status.tolist() == [0] * 7
    good = [row for row in range(7) if row not in bad]
    assert torch.equal(result.value[good], expected.value[good])
    assert relative_error(result.value, expected.value.double()) < 1e-5
    assert calls.count(1) >= 2 * len(bad), "each failing block alone, then in float64"


@pytest.mark.parametrize("retry", [False, True])
def test_a_block_that_fails_altogether_is_reported(monkeypatch, retry: bool) -> None:
    bad = [1, 4]
    A = _marked_stack(7, bad)
    expected = inverse_root(A, 2)
    fails_in = {torch.float32, torch.float64} if retry else {torch.float32}
    monkeypatch.setattr(torch.linalg, "eigh", _failing_eigh(fails_in, []))
    result = inverse_root(A, 2, EigenConfig(retry_double_precision=retry))
    for row in range(7):
        if row in bad:
            assert result.status[row] == InverseRootStatus.FAILED
            assert result.value[row].isnan().all()
        else:
            assert result.status[row] == InverseRootStatus.SUCCESS
            assert torch.equal(result.value[row], expected.value[row])


def test_running_out_of_memory_is_not_a_numerical_failure(monkeypatch) -> None:
    def eigh(A: torch.Tensor):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(torch.OutOfMemoryError):
        inverse_root(_marked_stack(2, []), 2)


def _diagonal(*eigenvalues: float) -> torch.Tensor:
    """One block with these eigenvalues and random eigenvectors, float64."""
    Q = random_orthogonal(1, len(eigenvalues), torch.Generator().manual_seed(0))
    A = (Q * torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.mT
    return (A + A.mT) / 2


def _eigenvalues_of_root(A: torch.Tensor, config: EigenConfig, epsilon: float) -> list[float]:
    value = inverse_root(A, 2, config, epsilon).value
    return sorted(torch.linalg.eigvalsh(value)[0].tolist())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Eigenvalues of A: -0.5, 0.05, 1, 4; epsilon 0.1, so eigh sees -0.4, 0.15, 1.1, 4.1.
        ("shampoo", [0.1, 0.65, 1.6, 4.6]),
        ("abs", [0.5, 0.05, 1.0, 4.0]),
        ("abs_add", [0.6, 0.15, 1.1, 4.1]),
        ("relu", [None, None, 1.0, 4.0]),
    ],
)
def test_spectrum_repairs(method, expected: list[float | None]) -> None:
    config = EigenConfig(rank_deficient_stability_config=SpectrumRepairConfig(method=method))
    A = _diagonal(-0.5, 0.05, 1.0, 4.0)
    roots = sorted(0.0 if x is None else x**-0.5 for x in expected)
    assert _eigenvalues_of_root(A, config, 0.1) == pytest.approx(roots, abs=1e-10)


def test_relu_gives_low_rank_without_infinities_at_epsilon_zero() -> None:
    config = EigenConfig(rank_deficient_stability_config=SpectrumRepairConfig(method="relu"))
    result = inverse_root(torch.zeros(1, 4, 4), 2, config)
    assert result.status.tolist() == [0]
    assert torch.equal(result.value, torch.zeros(1, 4, 4))


@pytest.mark.parametrize("perturb_before_computation", [True, False])
def test_the_bases_perturbation_of_an_indefinite_matrix(perturb_before_computation: bool) -> None:
    config = EigenConfig(
        rank_deficient_stability_config=PerturbationConfig(
            perturb_before_computation=perturb_before_computation
        )
    )
    A = _diagonal(-0.5, 0.05, 1.0, 4.0)
    # Both shift the smallest eigenvalue to epsilon; before the computation it was -0.5 + 0.1.
    expected = sorted((x + 0.5 + 0.1) ** -0.5 for x in (-0.5, 0.05, 1.0, 4.0))
    assert _eigenvalues_of_root(A, config, 0.1) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (PseudoInverseConfig(), [1e-9, 1.0, 4.0]),
        (PseudoInverseConfig(rank_rtol=None), [1e-9, 1.0, 4.0]),
        (PseudoInverseConfig(rank_rtol=1e-3), [1.0, 4.0]),
        (PseudoInverseConfig(rank_atol=2.0), [4.0]),
        (PseudoInverseConfig(rank_atol=5.0), []),
    ],
    ids=str,
)
def test_pseudo_inverse_drops_small_eigenvalues(
    config: PseudoInverseConfig, kept: list[float]
) -> None:
    A = torch.diag(torch.tensor([1e-9, 1.0, 4.0, -1e-3], dtype=torch.float64))[None]
    expected = sorted([0.0] * (4 - len(kept)) + [x**-0.5 for x in kept])
    eigen_config = EigenConfig(rank_deficient_stability_config=config)
    assert _eigenvalues_of_root(A, eigen_config, 0.0) == pytest.approx(expected, rel=1e-9)


def test_offloading_to_the_cpu_changes_nothing() -> None:
    A = random_spd(3, 6, 10.0, torch.Generator().manual_seed(0)).float()
    config = EigenConfig(eigendecomposition_offload_device="cpu")
    assert torch.equal(inverse_root(A, 4, config).value, inverse_root(A, 4).value)


def test_eigendecompositions_offloaded_from_a_gpu_run_on_threads(monkeypatch) -> None:
    """The part after the copy to the CPU; a failing block is found at its row of the whole stack."""
    A = _marked_stack(40, [3, 33], size=64)
    monkeypatch.setattr(torch.linalg, "eigh", _failing_eigh({torch.float32}, calls := []))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        L, Q, failed = _eigh_on_threads(A, retry_double_precision=False)
    finally:
        torch.set_num_threads(before)
    assert failed == [3, 33]
    assert len(calls) > 8
    good = [row for row in range(40) if row not in failed]
    torch.testing.assert_close((Q * L[:, None, :] @ Q.mT)[good], A[good], atol=1e-5, rtol=0.0)
