"""What a solver is to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver hands over; scaling, symmetrising, checks and statuses are the same for all.

    Attributes:
        X (Tensor): (B, N, N) new stack. It must not be finite where A is not.
        damping (Tensor | float): (B,), or one number: X aims at (A + damping·I)^(-1/root).
        scale (Tensor | None): (B,) by which X is to be multiplied. None is 1.
        is_symmetric (bool): Whether X is symmetric up to the rounding of one product; else the mean of X
            and Xᵀ is taken.
        status (Tensor | None): (B,) uint8. None is SUCCESS.
        iterations (Tensor | int): (B,) int32, or one number.
        residual (Tensor | None): (B,) a residual of the solver's own.
        size (Tensor | None): (B,) a number that is finite exactly where A is, such as a norm; None where
            the solver has none, which costs a pass over A.
    """

    X: Tensor
    damping: Tensor | float
    scale: Tensor | None = None
    is_symmetric: bool = False
    status: Tensor | None = None
    iterations: Tensor | int = 0
    residual: Tensor | None = None
    size: Tensor | None = None


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
    check: Callable[[Any, Fraction], object] = lambda config, root: None
    error: Callable[[Any, Fraction], float] = lambda config, root: 0.0
    is_serial: bool = False
    has_residual: bool = True
    waits: Callable[[Any], bool] = lambda config: False
    divides: bool = False
