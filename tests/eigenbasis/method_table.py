"""The one table that drives the tests of eigenbases: method, tolerances, and why those.

A new method adds a row to `METHODS`; every test of test_methods.py then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_shampoo.base import (
    EigendecompositionConfig,
    EighEigendecompositionConfig,
    QREigendecompositionConfig,
)
from dash_shampoo.eigenbasis import OrthogonalIterationConfig
from tests.reference.inverse_root import random_orthogonal


@dataclass(frozen=True)
class Row:
    """A method, and how close it has to come.

    Attributes:
        name: Of the row, unique.
        config: The method.
        refreshes: How many from a basis that is off by a tenth until it has converged, on a spectrum
            whose neighbours have a ratio of 2.
        float32, float64: Largest residual correlation then, per dtype.
        eigenvalues: Largest relative error of an eigenvalue then.
        orthogonality: Largest ‖QᵀQ - I‖_F/√N after any refresh, per dtype in machine epsilons, or
            absolute where the config has a tolerance for it.
        why: Where the tolerances come from.
        is_sorted: Whether eigenvalues ascend.
        finds: Whether a refresh from a basis that is off by far is exact.
    """

    name: str
    config: EigendecompositionConfig
    refreshes: int
    float32: float
    float64: float
    eigenvalues: float
    orthogonality: Callable[[torch.dtype], float]
    why: str
    is_sorted: bool
    finds: bool = False

    def tolerance(self, dtype: torch.dtype) -> float:
        return self.float64 if dtype == torch.float64 else self.float32


def _round_off(dtype: torch.dtype) -> float:
    return 200 * torch.finfo(dtype).eps


def _configured(dtype: torch.dtype) -> float:
    del dtype
    return 4 * 0.005  # four random vectors see the norm within a factor of a few


ROUND_OFF = "round-off of products and factorisation, amplified where eigenvalues are small"
CRITERION = "the test of E, a difference of squares, sees no less than √(machine epsilon)"
LINEAR = (
    "what is left after 60 iterations that halve the error each; round-off; columns of a rotation "
)
LINEAR += "may be too long by the tolerance of orthogonality"

METHODS: tuple[Row, ...] = (
    Row(
        "eigh",
        EighEigendecompositionConfig(),
        1,
        1e-4,
        1e-12,
        1e-3,
        _round_off,
        ROUND_OFF,
        True,
        finds=True,
    ),
    Row(
        "eigh_tolerance",
        EighEigendecompositionConfig(tolerance=1e-3),
        1,
        2e-2,
        2e-2,
        1e-3,
        _round_off,
        "blocks within the tolerance of 1e-3 keep their basis",
        False,
    ),
    Row(
        "qr",
        QREigendecompositionConfig(max_iterations=60),
        1,
        3e-3,
        1e-7,
        1e-3,
        _round_off,
        CRITERION,
        True,
        finds=True,
    ),
    *(
        Row(
            f"{orthogonalization}{suffix}",
            OrthogonalIterationConfig(
                orthogonalization=orthogonalization,
                use_sorting=bool(suffix),
            ),
            60,
            1e-4,
            1e-9,
            2e-2 if orthogonalization == "rotation" else 1e-3,
            _configured if orthogonalization == "rotation" else _round_off,
            LINEAR,
            bool(suffix),
        )
        for orthogonalization in ("rotation", "cholesky_qr", "householder")
        for suffix in ("", "_sorted")
    ),
)


def nearby_basis(Q: Tensor, angle: float, generator: torch.Generator) -> Tensor:
    """Q turned by a random rotation of about this angle."""
    size = Q.shape[-1]
    K = torch.randn(Q.shape, dtype=torch.float64, generator=generator) / size**0.5
    turned: Tensor = Q.double() @ torch.matrix_exp(angle * (K - K.mT))
    return turned.to(Q.dtype)


def separated(
    num_blocks: int, size: int, dtype: torch.dtype, seed: int, ratio: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Matrices whose eigenvalues fall by a ratio, scrambled, and a basis that is off by a tenth."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.stack(
        [torch.randperm(size, generator=generator) for _ in range(num_blocks)]
    ).double()
    Q = random_orthogonal(num_blocks, size, generator)
    A = (Q * (ratio**-exponents)[:, None, :]) @ Q.mT
    return ((A + A.mT) / 2).to(dtype), nearby_basis(Q, 0.1, generator).to(dtype)


def orthogonality(Q: Tensor) -> Tensor:
    """(B,) ‖QᵀQ - I‖_F/√N, in float64."""
    Q = Q.double()
    size = Q.shape[-1]
    identity = torch.eye(size, dtype=torch.float64)
    return torch.linalg.vector_norm(Q.mT @ Q - identity, dim=(-2, -1)) / size**0.5
