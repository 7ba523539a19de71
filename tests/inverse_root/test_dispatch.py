"""The entry point: shapes, dtypes, roots, refusals, statuses."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch

from dash_shampoo.base import (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    PseudoInverseConfig,
    RankDeficientStabilityConfig,
    RootInvConfig,
)
from dash_shampoo.inverse_root import (
    ChebyshevConfig,
    FrobeniusScaling,
    InverseRootStatus,
    NewtonDBConfig,
    PowerIterationScaling,
    ScaledCoupledNewtonConfig,
    ScalingConfig,
    SpectrumRepairConfig,
    check_supported,
    inverse_root,
)
from dash_shampoo.inverse_root.registry import as_root
from tests.inverse_root.solver_table import SOLVERS
from tests.reference.inverse_root import random_spd

each_row = pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)


@dataclass(kw_only=True)
class UnknownConfig(RootInvConfig):
    pass


@dataclass(kw_only=True)
class UnknownRepair(RankDeficientStabilityConfig):
    pass


@dataclass(kw_only=True)
class MyEigenConfig(EigenConfig):
    pass


@dataclass(kw_only=True, frozen=True)
class UnknownScaling(ScalingConfig):
    pass


def _spd(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = math.prod(shape[:-2])
    A = random_spd(count, shape[-1], 10.0, torch.Generator().manual_seed(0))
    return A.reshape(shape).to(dtype)


@each_row
@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0), (4, 4), (1, 1), (2, 3, 4, 4)])
def test_shapes(row, shape: tuple[int, ...]) -> None:
    A = _spd(*shape) if math.prod(shape) else torch.zeros(shape)
    result = inverse_root(A, row.roots[0], row.config)
    num_blocks = math.prod(shape[:-2])
    assert result.value.shape == A.shape
    assert result.status.shape == (num_blocks,)
    assert result.status.dtype == torch.uint8
    assert result.iterations.shape == (num_blocks,)
    assert result.iterations.dtype == torch.int32
    assert result.residual.shape == (num_blocks,)
    if A.ndim == 4:
        flat = inverse_root(A.flatten(0, 1), row.roots[0], row.config)
        assert torch.equal(flat.value.reshape(shape), result.value)


@each_row
def test_strided_input(row) -> None:
    A = _spd(6, 8, 8)
    strided = torch.stack((A, A), dim=-1)[::2, :, :, 0]
    assert not strided.is_contiguous()
    expected = inverse_root(A[::2], row.roots[0], row.config).value
    assert torch.equal(inverse_root(strided, row.roots[0], row.config).value, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    A = _spd(2, 4, 4, dtype=dtype)
    result = inverse_root(A, 2)
    assert result.value.dtype == torch.float32
    assert torch.equal(result.value, inverse_root(A.float(), 2).value)


@pytest.mark.parametrize(
    "A",
    [
        torch.ones(3),
        torch.ones(2, 3),
        torch.ones(2, 3, 4),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.complex64),
    ],
    ids=lambda A: f"{tuple(A.shape)}-{A.dtype}",
)
def test_shapes_and_dtypes_that_are_refused(A: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="A must be"):
        inverse_root(A, 2)


@pytest.mark.parametrize("root", [0, -1, math.inf, math.nan, "2", None, True, Fraction(0)])
def test_roots_that_are_refused(root: object) -> None:
    with pytest.raises(ValueError, match="root"):
        inverse_root(_spd(2, 3, 3), root)


@pytest.mark.parametrize("epsilon", [-1e-3, math.inf, math.nan])
def test_epsilons_that_are_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        inverse_root(_spd(2, 3, 3), 2, epsilon=epsilon)


@pytest.mark.parametrize(
    ("config", "root", "message"),
    [
        (UnknownConfig(), 2, "UnknownConfig"),
        (object(), 2, "object"),
        (None, 2, "NoneType"),
        (EigenConfig(rank_deficient_stability_config=UnknownRepair()), 2, "UnknownRepair"),
        (CoupledNewtonConfig(), 10 / 3, "root=.*integer"),
        (ScaledCoupledNewtonConfig(), 2.5, "root=.*integer"),
        (NewtonDBConfig(), 3, "root=3 is not one of 2, 4, 8"),
        (NewtonDBConfig(), 1, "root=1 is not one of 2, 4, 8"),
        (CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0), math.pi, "root="),
        (CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0, order=1), 2, "order=1"),
    ],
)
def test_configs_and_roots_without_a_solver(config, root: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_supported(config, root)
    with pytest.raises(ValueError, match=message):
        inverse_root(_spd(2, 3, 3), root, config)


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="UnknownScaling"):
        inverse_root(_spd(2, 3, 3), 2, NewtonDBConfig(scaling=UnknownScaling()))


@each_row
def test_every_root_of_the_table_is_supported(row) -> None:
    for root in row.roots:
        check_supported(row.config, root)


def test_a_subclass_of_a_known_config_has_its_solver() -> None:
    A = _spd(2, 3, 3)
    assert torch.equal(inverse_root(A, 2, MyEigenConfig()).value, inverse_root(A, 2).value)


def test_pseudo_inverse_refuses_epsilon() -> None:
    config = EigenConfig(rank_deficient_stability_config=PseudoInverseConfig())
    with pytest.raises(ValueError, match=r"epsilon=.*PseudoInverse"):
        inverse_root(_spd(2, 3, 3), 2, config, epsilon=1e-3)


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (4, Fraction(4)),
        (4.0, Fraction(4)),
        (1 / 0.3, Fraction(10, 3)),
        (1 / 0.375, Fraction(8, 3)),
        (Fraction(3, 2), Fraction(3, 2)),
        (math.pi, Fraction(math.pi)),
    ],
)
def test_roots_as_fractions(root: float, expected: Fraction) -> None:
    assert as_root(root) == expected


def test_every_block_has_its_own_status() -> None:
    eye = torch.eye(4)
    slow = torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-6]))
    A = torch.stack([eye, slow, eye * torch.nan, torch.zeros(4, 4), eye * torch.inf])
    result = inverse_root(A, 2, CoupledNewtonConfig(max_iterations=5))
    expected = [
        InverseRootStatus.SUCCESS,
        InverseRootStatus.MAX_ITERATIONS,
        InverseRootStatus.NON_FINITE_INPUT,
        InverseRootStatus.NON_FINITE_RESULT,
        InverseRootStatus.NON_FINITE_INPUT,
    ]
    assert result.status.tolist() == expected
    assert result.is_usable.tolist() == [True, True, False, False, False]
    assert torch.isfinite(result.value[:2]).all()
    assert result.value[2:].isnan().all()
    assert result.iterations[1] == 5
    assert result.residual[1] > 1e-6


def test_the_error_check_of_the_higher_order_solver_is_a_status() -> None:
    config = CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0, max_iterations=8)
    A = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-12]))])
    result = inverse_root(A, 2, config)
    assert result.status.tolist() == [InverseRootStatus.SUCCESS, InverseRootStatus.FAILED]
    assert result.residual[1] > 0.1
    assert result.value[1].isnan().all()


def test_statuses_say_what_to_try() -> None:
    for status in InverseRootStatus:
        assert status.message.endswith(".")
    assert [status for status in InverseRootStatus if status.is_usable] == [
        InverseRootStatus.SUCCESS,
        InverseRootStatus.MAX_ITERATIONS,
    ]


@pytest.mark.parametrize(
    "config",
    [
        NewtonDBConfig(num_iterations=7, scaling=PowerIterationScaling(num_vectors=16)),
        ChebyshevConfig(degree=20),
        ScaledCoupledNewtonConfig(matmul_precision="bf16"),
        SpectrumRepairConfig(method="relu"),
        FrobeniusScaling(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configs_pickle_and_compare(config) -> None:
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NewtonDBConfig(num_iterations=0), "num_iterations=0 in NewtonDBConfig"),
        (lambda: NewtonDBConfig(num_iterations=2.5), "num_iterations=2.5"),
        (lambda: NewtonDBConfig(scaling="frobenius"), "scaling='frobenius'"),
        (lambda: NewtonDBConfig(matmul_precision="fp8"), "matmul_precision='fp8'.*fp32, fp16x3"),
        (lambda: ChebyshevConfig(degree=0), "degree=0"),
        (lambda: ChebyshevConfig(num_nodes=60), "num_nodes=60"),
        (lambda: ChebyshevConfig(relative_epsilon=0.0), "relative_epsilon=0.0"),
        (lambda: ChebyshevConfig(evaluation="horner"), "evaluation='horner'.*clenshaw"),
        (lambda: ScaledCoupledNewtonConfig(max_iterations=-1), "max_iterations=-1"),
        (lambda: ScaledCoupledNewtonConfig(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: SpectrumRepairConfig(method="clip"), "method='clip'.*shampoo, abs"),
        (lambda: PowerIterationScaling(num_iterations=0), "num_iterations=0"),
        (lambda: PowerIterationScaling(num_vectors=0), "num_vectors=0"),
        (lambda: PowerIterationScaling(safety_factor=0.5), "safety_factor=0.5"),
        (lambda: PowerIterationScaling(matmul_precision="int8"), "matmul_precision='int8'"),
    ],
)
def test_configs_refuse_bad_values_and_name_them(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_abstract_scaling_cannot_be_built() -> None:
    with pytest.raises(TypeError):
        ScalingConfig()  # type: ignore[abstract]


@each_row
def test_autocast_and_default_device_have_no_say(row) -> None:
    A = _spd(3, 8, 8)
    expected = inverse_root(A, row.roots[0], row.config).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inverse_root(A, row.roots[0], row.config).value, expected)
    with torch.device("meta"):
        assert torch.equal(inverse_root(A, row.roots[0], row.config).value, expected)
    with torch.inference_mode():
        assert torch.equal(inverse_root(A, row.roots[0], row.config).value, expected)
