"""What an inverse root returns: the roots, and per block whether they can be used.

A numerical failure is a value, not an exception: one bad block must not stop the others.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor


@enum.unique
class InverseRootStatus(enum.IntEnum):
    """How the inverse root of one block ended.

    The numbers are what `InverseRootResult.status` holds; 0 alone means that nothing is wrong.
    `message` says in one sentence what happened and what to try.
    """

    SUCCESS = 0
    MAX_ITERATIONS = 1
    NON_FINITE_INPUT = 2
    NON_FINITE_RESULT = 3
    FAILED = 4
    INACCURATE = 5

    @property
    def message(self) -> str:
        """One sentence: what happened, and what to try."""
        return _MESSAGES[self]

    @property
    def is_usable(self) -> bool:
        """Whether the block's value is finite and meant to be used as it is."""
        return self in (InverseRootStatus.SUCCESS, InverseRootStatus.MAX_ITERATIONS)


_MESSAGES = {
    InverseRootStatus.SUCCESS: "The inverse root was computed.",
    InverseRootStatus.MAX_ITERATIONS: (
        "The iteration reached its cap before its tolerance; the value can be used, a larger "
        "epsilon or more iterations bring it closer."
    ),
    InverseRootStatus.NON_FINITE_INPUT: (
        "The factor matrix holds NaN or infinity; look at the gradients of this parameter."
    ),
    InverseRootStatus.NON_FINITE_RESULT: (
        "The inverse root came out as NaN or infinity; a singular factor matrix needs "
        "epsilon > 0 or a pseudo-inverse, and half-precision products may need fp32."
    ),
    InverseRootStatus.FAILED: (
        "The solver gave up on this block (no convergence, or its own error check failed); "
        "try a larger epsilon or the eigen solver."
    ),
    InverseRootStatus.INACCURATE: (
        "The residual is above the threshold; try a larger epsilon, more iterations or the "
        "eigen solver."
    ),
}


@dataclass(frozen=True, eq=False)
class InverseRootResult:
    """The inverse roots of a stack, and per block how they came about.

    Attributes:
        value (Tensor): A^(-1/root), of the input's shape (B, N, N) (or (N, N)). Blocks whose
            status is NON_FINITE_INPUT, NON_FINITE_RESULT or FAILED are filled with NaN, so that
            none of them can be used by mistake.
        status (Tensor): (B,) uint8, one `InverseRootStatus` per block.
        iterations (Tensor): (B,) int32, the iterations that the block took (0 for `eigen`).
        residual (Tensor): (B,) of the compute dtype: the sketched residual where one was asked for,
            else the solver's own where it has one (coupled Newton: max|M - I|), else NaN.
        damping (Tensor): (B,) of the compute dtype: the value aims at (A + damping·I)^(-1/root).
    """

    value: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    damping: Tensor

    @property
    def is_usable(self) -> Tensor:
        """(B,) bool: the blocks whose value is finite and meant to be used."""
        return is_usable(self.status)


def is_usable(status: Tensor) -> Tensor:
    """(B,) bool: which statuses say that the value is finite and meant to be used."""
    return status <= int(InverseRootStatus.MAX_ITERATIONS)


@dataclass(frozen=True, eq=False)
class StackOutcome:
    """What became of every matrix of a stack, beside the roots; numbers that are the same for all are one.

    Attributes:
        status (Tensor): (B,) uint8, one `InverseRootStatus` per matrix.
        damping (Tensor | float): (B,) what was added to the diagonals: the roots are those of A + damping·I.
        iterations (Tensor | int): (B,) int32, as of `InverseRootResult`.
        residual (Tensor | float): (B,) as of `InverseRootResult`; NaN is unknown.
    """

    status: Tensor
    damping: Tensor | float
    iterations: Tensor | int = 0
    residual: Tensor | float = float("nan")

    def result(self, value: Tensor, dtype: torch.dtype) -> InverseRootResult:
        """With the roots, and a number per block.

        Args:
            value: The roots.
            dtype: The compute dtype.

        Returns:
            The result.
        """

        def of_each(number: Tensor | float, dtype: torch.dtype) -> Tensor:
            if isinstance(number, Tensor):
                return number
            return torch.full_like(self.status, number, dtype=dtype)

        return InverseRootResult(
            value=value,
            status=self.status,
            iterations=of_each(self.iterations, torch.int32),
            residual=of_each(self.residual, dtype),
            damping=of_each(self.damping, dtype),
        )


def failures(rows: list[int], like: Tensor) -> Tensor:
    """(B,) statuses for a stack (B, N, N): FAILED in some rows, else SUCCESS."""
    status = torch.zeros(like.shape[0], dtype=torch.uint8, device=like.device)
    if rows:
        status[rows] = int(InverseRootStatus.FAILED)
    return status
