"""To be written: the solver of this name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import Tensor

from dash_shampoo.inverse_root.result import InverseRootResult


def coupled_newton(A: Tensor, root: Fraction, config: Any, epsilon: float) -> InverseRootResult:
    """Not written yet."""
    raise NotImplementedError


def scaled_coupled_newton(
    A: Tensor, root: Fraction, config: Any, epsilon: float
) -> InverseRootResult:
    """Not written yet."""
    raise NotImplementedError


def check(config: Any, root: Fraction) -> None:
    """Not written yet."""
