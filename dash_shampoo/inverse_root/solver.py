"""What a solver is to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dash_shampoo.inverse_root.result import Solution


def _accept(config: Any, root: Fraction) -> None:
    """A check of a solver that does every root."""


def _never(config: Any) -> bool:
    """Of a solver whose number of steps is fixed."""
    return False


def _exact(config: Any, root: Fraction) -> float:
    """The error of a solver that promises the root itself."""
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A solver, and what must be known of it to run it.

    Attributes:
        solve (Callable): solve(A, root, config, epsilon) gives the `Solution` of a stack (B, N, N), B and
            N at least 1, contiguous, float32 or float64, which it must not write to. Blocks must not
            touch each other; where A is not finite, the solution must not be. With `divides`, a fifth
            argument d, a number or a scalar on the device, asks for the solution of A/d.
        workspace (Callable): workspace(config, root) is how many N×N matrices it holds at its peak for
            each matrix of the stack, beside A and the root.
        check (Callable): check(config, root) raises ValueError for what it can't do. Default: accepts.
        error (Callable): error(config, root) is the largest relative error of an eigenvalue of the root
            that it promises. Default: 0.
        is_serial (bool): Whether it occupies one thread of the CPU alone, whatever N is. Default: False.
        has_residual (bool): Whether a sketched residual tells anything. Of an eigendecomposition it
            would measure the rounding of eigenvalues below machine precision times λ_max. Default: True.
        waits (Callable): waits(config) is whether the host waits for an accelerator while it solves.
            Default: never.
        divides (bool): Whether it divides A by a number without a pass of its own. Default: False.
    """

    solve: Callable[..., Solution]
    workspace: Callable[[Any, Fraction], int]
    check: Callable[[Any, Fraction], None] = _accept
    error: Callable[[Any, Fraction], float] = _exact
    is_serial: bool = False
    has_residual: bool = True
    waits: Callable[[Any], bool] = _never
    divides: bool = False
