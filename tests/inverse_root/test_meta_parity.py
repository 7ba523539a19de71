"""The base's own configs give the base's results: block by block against Meta's implementation."""

from __future__ import annotations

import logging
from dataclasses import fields
from fractions import Fraction
from importlib import import_module
from types import ModuleType

import pytest
import torch

from dash_shampoo.base import (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    PerturbationConfig,
    PseudoInverseConfig,
)
from dash_shampoo.inverse_root import InverseRootStatus, ScaledCoupledNewtonConfig, inverse_root
from tests.reference.inverse_root import random_spd, relative_error

FLOAT64 = 1e-10
# float32: both round differently, and the round-off grows with the condition number 1e4.
FLOAT32 = 2e-3


@pytest.fixture(scope="module")
def meta() -> ModuleType:
    return pytest.importorskip(
        "distributed_shampoo.preconditioner.matrix_functions",
        reason="Meta's distributed_shampoo is not importable",
    )


def _to_meta(config: object) -> object:
    """The same config of Meta's package, if the base in use is the embedded one."""
    types = import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    values = {
        field.name: _to_meta(getattr(config, field.name))
        if field.name == "rank_deficient_stability_config"
        else getattr(config, field.name)
        for field in fields(config)  # type: ignore[arg-type]
    }
    return getattr(types, type(config).__name__)(**values)


def _stack(dtype: torch.dtype) -> torch.Tensor:
    """Well and ill conditioned, small and large, low-rank, slightly indefinite, and the identity."""
    generator = torch.Generator().manual_seed(0)
    size = 24
    blocks = [
        random_spd(1, size, condition, generator, scale)[0]
        for condition, scale in ((2.0, 1.0), (1e2, 1e-6), (1e3, 1e4), (1e4, 1.0))
    ]
    V = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    blocks += [V @ V.T, blocks[0] - 0.6 * torch.eye(size, dtype=torch.float64)]
    blocks.append(torch.eye(size, dtype=torch.float64))
    return torch.stack(blocks).to(dtype)


WELL_DEFINED = [0, 1, 2, 3, 6]  # the blocks that are positive definite without damping

CASES = [
    (EigenConfig(), 1e-3, (2, 4, 10 / 3, 3), range(7)),
    (EigenConfig(), 0.0, (2, 4), WELL_DEFINED),
    (
        EigenConfig(
            rank_deficient_stability_config=PerturbationConfig(perturb_before_computation=False)
        ),
        1e-3,
        (2, 4),
        range(7),
    ),
    (
        EigenConfig(rank_deficient_stability_config=PseudoInverseConfig(rank_rtol=1e-5)),
        0.0,
        (2, 4),
        range(7),
    ),
    (
        EigenConfig(rank_deficient_stability_config=PseudoInverseConfig(rank_rtol=None)),
        0.0,
        (2, 4),
        WELL_DEFINED,
    ),
    (CoupledNewtonConfig(), 0.0, (1, 2, 3, 4, 8), WELL_DEFINED),
    (CoupledNewtonConfig(max_iterations=10), 1e-6, (2, 4), WELL_DEFINED),
    (CoupledNewtonConfig(tolerance=1e-3), 1e-3, (2, 4), WELL_DEFINED),
    *(
        (
            CoupledHigherOrderConfig(rel_epsilon=rel, abs_epsilon=absolute, order=order),
            0.0,
            (2, 4, 10 / 3, 3 / 2),
            WELL_DEFINED,
        )
        for rel, absolute, order in ((0.0, 0.0, 3), (1e-4, 0.0, 2), (1e-6, 1e-3, 4))
    ),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("config", "epsilon", "roots", "rows"), CASES, ids=lambda x: str(x)[:70])
def test_stacked_roots_equal_metas_one_by_one(meta, config, epsilon, roots, rows, dtype) -> None:
    logging.getLogger(meta.__name__).setLevel(logging.ERROR)
    rows = list(rows)
    A = _stack(dtype)
    for root in roots:
        fraction = Fraction(root).limit_denominator(100)
        expected = torch.stack(
            [meta.matrix_inverse_root(A[row], fraction, _to_meta(config), epsilon) for row in rows]
        )
        value = inverse_root(A, root, config, epsilon).value[rows]
        tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
        assert relative_error(value, expected.double()) <= tolerance


def test_the_scaled_config_with_its_defaults_is_the_bases() -> None:
    A = _stack(torch.float64)[WELL_DEFINED]
    plain, scaled = (
        inverse_root(A, 4, config)
        for config in (CoupledNewtonConfig(), ScaledCoupledNewtonConfig())
    )
    assert torch.equal(plain.value, scaled.value)


def test_what_meta_raises_is_a_status_here(meta) -> None:
    config = CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0, max_iterations=6)
    A = random_spd(2, 8, 1e8, torch.Generator().manual_seed(0))
    A[0] = torch.eye(8)
    result = inverse_root(A, 2, config)
    with pytest.raises(ArithmeticError):
        meta.matrix_inverse_root(A[1], Fraction(2), _to_meta(config))
    assert result.status[1] == InverseRootStatus.FAILED
    assert result.status[0] != InverseRootStatus.FAILED


def test_zero_matrices_without_damping_end_as_in_meta(meta) -> None:
    """NaN there, a status and NaN here."""
    zero = torch.zeros(1, 4, 4)
    for config in (EigenConfig(), CoupledNewtonConfig()):
        assert not meta.matrix_inverse_root(zero[0], Fraction(2), _to_meta(config)).isfinite().all()
        assert inverse_root(zero, 2, config).status.tolist() == [
            InverseRootStatus.NON_FINITE_RESULT
        ]
