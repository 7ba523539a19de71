"""What each method does, step by step: the base's rules, orthogonal iteration, configs, drift."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dash_shampoo import base
from dash_shampoo.base import (
    EigenConfig,
    EigendecompositionConfig,
    EighEigendecompositionConfig,
    PerturbationConfig,
    PseudoInverseConfig,
    QREigendecompositionConfig,
)
from dash_shampoo.eigenbasis import (
    OrthogonalIterationConfig,
    check_basis_supported,
    eigenbasis,
    is_identity,
    method_at,
)
from dash_shampoo.inverse_root import InverseRootStatus
from tests.eigenbasis.method_table import nearby_basis, orthogonality, separated
from tests.reference.eigenbasis import (
    off_diagonal_share,
    reference_orthogonal_iteration,
    reference_qr_algorithm,
    residual_correlation,
)


def same_up_to_signs(X: Tensor, Y: Tensor, tolerance: float) -> bool:
    signs = torch.where((X * Y).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return float((X * signs - Y).abs().max()) <= tolerance


@pytest.mark.parametrize(
    ("max_iterations", "tolerance"), [(0, 0.0), (1, 0.0), (3, 0.0), (40, 0.05)]
)
def test_qr_iterates_each_block_until_it_is_nearly_diagonal(
    max_iterations: int, tolerance: float
) -> None:
    A, Q = separated(8, 10, torch.float64, seed=0)
    Q[::3] = nearby_basis(torch.linalg.eigh(A[::3])[1], 1e-3, torch.Generator().manual_seed(1))
    config = QREigendecompositionConfig(max_iterations=max_iterations, tolerance=tolerance)
    result = eigenbasis(A, Q, config)
    for i in range(len(A)):
        eigenvalues, eigenvectors = reference_qr_algorithm(A[i], Q[i], max_iterations, tolerance)
        assert torch.allclose(result.eigenvalues[i], eigenvalues, rtol=1e-9, atol=1e-12)
        assert same_up_to_signs(result.eigenvectors[i], eigenvectors, 1e-9)
    if tolerance:
        shares = [
            off_diagonal_share(V.T @ M @ V) for V, M in zip(result.eigenvectors, A, strict=True)
        ]
        assert max(shares) <= tolerance
        kept = Q[0].gather(-1, result.order[0].expand(10, 10))
        assert torch.equal(result.eigenvectors[0], kept)  # it was good enough: sorted alone


def test_eigh_with_a_tolerance_keeps_the_blocks_that_are_good_enough_unsorted() -> None:
    A, Q = separated(6, 10, torch.float64, seed=0)
    Q[::2] = nearby_basis(torch.linalg.eigh(A[::2])[1].flip(-1), 1e-4, torch.Generator())
    result = eigenbasis(A, Q, EighEigendecompositionConfig(tolerance=0.01))
    direct = eigenbasis(A, Q, EighEigendecompositionConfig())
    assert torch.equal(result.eigenvectors[::2], Q[::2])
    assert torch.equal(result.eigenvectors[1::2], direct.eigenvectors[1::2])
    assert torch.allclose(result.eigenvalues[::2].flip(-1), direct.eigenvalues[::2], rtol=1e-4)


@pytest.mark.parametrize("orthogonalization", ["cholesky_qr", "householder"])
def test_orthogonal_iteration_is_gram_schmidt_in_descending_order(orthogonalization: str) -> None:
    A, Q = separated(5, 9, torch.float64, seed=4)
    config = OrthogonalIterationConfig(orthogonalization=orthogonalization)  # type: ignore[arg-type]
    result = eigenbasis(A, Q, config)
    largest = (Q * (A @ Q)).sum(-2).amax(-1)
    damped = A + 1e-5 * largest[:, None, None] * torch.eye(9, dtype=A.dtype)
    expected = torch.stack([reference_orthogonal_iteration(damped[i], Q[i]) for i in range(5)])
    assert same_up_to_signs(result.eigenvectors, expected, 1e-8)
    assert bool(((result.eigenvectors * Q).sum(-2) > 0).all())  # no column turns over


def test_a_rotation_is_orthogonal_iteration_to_first_order() -> None:
    """Halving the angle of the start quarters the difference."""
    A, Q = separated(5, 9, torch.float64, seed=4)
    true = torch.linalg.eigh(A)[1]
    differences = []
    for angle in (1e-3, 5e-4):
        Q = nearby_basis(true, angle, torch.Generator().manual_seed(0))
        result = eigenbasis(A, Q, OrthogonalIterationConfig())
        expected = torch.stack([reference_orthogonal_iteration(A[i], Q[i]) for i in range(5)])
        differences.append(float((result.eigenvectors - expected).norm()))
        assert float(orthogonality(result.eigenvectors).max()) < angle**2
    assert differences[1] < 0.35 * differences[0]


def drifting(steps: int, generator: torch.Generator) -> list[Tensor]:
    """EMAs of outer products of gradients whose covariance turns slowly, 8 blocks of 24."""
    size, beta = 24, 0.95
    scales = torch.logspace(0, -2, size, dtype=torch.float64)
    turn = 0.02 * torch.randn(8, size, size, dtype=torch.float64, generator=generator)
    turn = torch.matrix_exp((turn - turn.mT) / size**0.5)
    basis = torch.eye(size, dtype=torch.float64).expand(8, -1, -1)
    A = torch.zeros(8, size, size, dtype=torch.float64)
    factors = []
    for step in range(steps):
        basis = turn @ basis
        noise = torch.randn(8, size, size, dtype=torch.float64, generator=generator)
        grads = (basis * scales) @ noise
        A = beta * A + (1 - beta) * grads @ grads.mT
        factors.append((A / (1 - beta ** (step + 1))).float())
    return factors


def test_on_a_drifting_factor_the_rotation_tracks_as_qr_does_and_the_base_s_order_does_not() -> (
    None
):
    factors = drifting(60, torch.Generator().manual_seed(0))

    def tracked(config: EigendecompositionConfig) -> float:
        Q = torch.linalg.eigh(factors[0])[1]
        correlations = []
        for A in factors[1:]:
            Q = eigenbasis(A, Q, config).eigenvectors
            correlations.append(residual_correlation(A, Q).square().mean().sqrt())
        return float(torch.stack(correlations[20:]).mean())

    householder = tracked(OrthogonalIterationConfig(orthogonalization="householder"))
    assert tracked(OrthogonalIterationConfig()) <= 1.5 * householder
    assert tracked(OrthogonalIterationConfig(num_iterations=2)) <= 0.8 * householder
    assert tracked(OrthogonalIterationConfig(orthogonalization="cholesky_qr")) <= 1.1 * householder
    assert tracked(QREigendecompositionConfig()) >= 3 * householder


def test_without_sorting_every_column_continues_its_own() -> None:
    A = torch.diag_embed(torch.tensor([[4.0, 2.0, 1.0]]))
    Q = nearby_basis(torch.eye(3)[None], 0.01, torch.Generator().manual_seed(0))
    crossed = torch.diag_embed(torch.tensor([[1.0, 2.0, 4.0]]))  # eigenvalues change places
    for orthogonalization in ("rotation", "cholesky_qr", "householder"):
        config = OrthogonalIterationConfig(orthogonalization=orthogonalization)  # type: ignore[arg-type]
        result = eigenbasis(crossed, Q, config)
        assert result.order is None
        assert bool((result.eigenvectors.diagonal(dim1=-2, dim2=-1) > 0.99).all())
        result = eigenbasis(crossed, Q, dataclasses.replace(config, use_sorting=True))
        assert result.order.tolist() == [[0, 1, 2]]
        result = eigenbasis(A, Q, dataclasses.replace(config, use_sorting=True))
        assert result.order.tolist() == [[2, 1, 0]]


def test_a_tolerance_keeps_blocks_that_are_good_enough() -> None:
    A, Q = separated(4, 8, torch.float32, seed=0)
    Q[:2] = torch.linalg.eigh(A[:2])[1]
    for orthogonalization in ("rotation", "cholesky_qr", "householder"):
        config = OrthogonalIterationConfig(orthogonalization=orthogonalization, tolerance=0.01)  # type: ignore[arg-type]
        result = eigenbasis(A, Q, config)
        assert torch.equal(result.eigenvectors[:2], Q[:2])
        assert not torch.equal(result.eigenvectors[2:], Q[2:])


def test_epsilon_is_added_before_the_computation_or_not_at_all() -> None:
    A, Q = separated(2, 4, torch.float64, seed=0)
    plain = eigenbasis(A, Q, EighEigendecompositionConfig()).eigenvalues
    damped = eigenbasis(A, Q, EighEigendecompositionConfig(), epsilon=0.5).eigenvalues
    assert torch.allclose(damped, plain + 0.5)
    later = EighEigendecompositionConfig(
        rank_deficient_stability_config=PerturbationConfig(perturb_before_computation=False)
    )
    assert torch.equal(eigenbasis(A, Q, later, epsilon=0.5).eigenvalues, plain)


def test_a_failed_eigendecomposition_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    A, Q = separated(3, 4, torch.float32, seed=0)
    expected = eigenbasis(A, Q, EighEigendecompositionConfig())
    real = torch.linalg.eigh

    def failing(A: Tensor) -> tuple[Tensor, Tensor]:
        if bool((A == 7.0).flatten(1).all(1).any()):
            raise torch.linalg.LinAlgError("no convergence")
        return real(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    A[1] = 7.0
    result = eigenbasis(A, Q, EighEigendecompositionConfig())
    assert result.status.tolist() == [0, int(InverseRootStatus.FAILED), 0]
    assert torch.equal(result.eigenvectors[1], Q[1])
    assert torch.equal(result.eigenvectors[::2], expected.eigenvectors[::2])


def test_an_eigen_config_is_an_eigendecomposition() -> None:
    A, Q = separated(2, 4, torch.float32, seed=0)
    result = eigenbasis(A, Q, EigenConfig())
    assert torch.equal(
        result.eigenvectors, eigenbasis(A, Q, EighEigendecompositionConfig()).eigenvectors
    )


def test_a_basis_in_half_precision_is_taken_as_it_is() -> None:
    A, Q = separated(2, 8, torch.float32, seed=0)
    result = eigenbasis(A, Q.bfloat16(), OrthogonalIterationConfig())
    assert result.eigenvectors.dtype == torch.float32
    assert result.is_usable.all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0)])
@pytest.mark.parametrize("config", [EighEigendecompositionConfig(), OrthogonalIterationConfig()])
def test_empty_stacks(shape: tuple[int, ...], config: EigendecompositionConfig) -> None:
    result = eigenbasis(torch.zeros(shape), torch.zeros(shape), config)
    assert result.eigenvectors.shape == shape
    assert result.eigenvalues.shape == shape[:2]
    assert result.status.shape == shape[:1]


def test_identity_is_told_from_what_is_near_it() -> None:
    Q = torch.eye(4).repeat(3, 1, 1)
    Q[1, 3, 0] = 1e-6
    assert is_identity(Q).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"num_iterations": True}, "num_iterations=True"),
        ({"num_early_iterations": 0}, "num_early_iterations=0"),
        ({"orthogonalization": "qr"}, "orthogonalization='qr'.*rotation, cholesky_qr, householder"),
        ({"orthogonality_tolerance": 0.0}, "orthogonality_tolerance=0.0"),
        ({"orthogonality_tolerance": float("inf")}, "orthogonality_tolerance=inf"),
        ({"tolerance": 1.5}, "tolerance"),
    ],
)
def test_bad_options_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrthogonalIterationConfig(**arguments)  # type: ignore[arg-type]


def test_a_method_that_follows_iterates_more_in_the_first_ten_refreshes() -> None:
    config = OrthogonalIterationConfig(num_iterations=2, num_early_iterations=5, tolerance=0.1)
    early = method_at(config, 9)
    assert early == OrthogonalIterationConfig(
        num_iterations=5, num_early_iterations=5, tolerance=0.1
    )
    assert method_at(config, 0) == early
    assert method_at(config, 10) is config
    assert method_at(OrthogonalIterationConfig(num_iterations=6), 0).num_iterations == 6
    assert method_at(eigh := EighEigendecompositionConfig(), 0) is eigh


def test_bad_input_is_refused_by_name() -> None:
    A = torch.eye(3).expand(2, 3, 3)
    config = EighEigendecompositionConfig()
    with pytest.raises(ValueError, match=r"A must be a stack.*\(3, 3\)"):
        eigenbasis(A[0], A[0], config)
    with pytest.raises(
        ValueError, match=r"Q must have the shape of A, \(2, 3, 3\), not \(1, 3, 3\)"
    ):
        eigenbasis(A, A[:1], config)
    with pytest.raises(ValueError, match=r"float32 or float64, not torch\.bfloat16"):
        eigenbasis(A.bfloat16(), A, config)
    with pytest.raises(ValueError, match=r"epsilon=-1\.0"):
        eigenbasis(A, A, config, epsilon=-1.0)
    pseudo = EighEigendecompositionConfig(rank_deficient_stability_config=PseudoInverseConfig())
    with pytest.raises(ValueError, match=r"epsilon=0.1 must be 0\.0 with PseudoInverseConfig"):
        check_basis_supported(pseudo, 0.1)
    with pytest.raises(ValueError, match="No eigenbasis takes str"):
        check_basis_supported("eigh")  # type: ignore[arg-type]


@pytest.mark.skipif(base.name != "meta", reason="needs Meta's package")
@pytest.mark.parametrize(
    "config",
    [
        EighEigendecompositionConfig(),
        EighEigendecompositionConfig(tolerance=0.05),
        QREigendecompositionConfig(),
        QREigendecompositionConfig(max_iterations=5, tolerance=0.02),
    ],
    ids=str,
)
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_blocks_come_out_as_meta_s(config: EigendecompositionConfig, epsilon: float) -> None:
    from distributed_shampoo.preconditioner.matrix_functions import matrix_eigendecomposition

    A, Q = separated(8, 10, torch.float64, seed=0)
    Q[::3] = nearby_basis(torch.linalg.eigh(A[::3])[1], 1e-2, torch.Generator().manual_seed(1))
    result = eigenbasis(A, Q, config, epsilon)
    for i in range(len(A)):
        eigenvalues, eigenvectors = matrix_eigendecomposition(
            A[i], epsilon, config, eigenvectors_estimate=Q[i]
        )
        assert torch.allclose(result.eigenvalues[i], eigenvalues, rtol=1e-10)
        assert same_up_to_signs(result.eigenvectors[i], eigenvectors, 1e-10)
