"""What an inverse root returns: the roots, and per block whether they can be used.

A numerical failure is a value, not an exception: one bad block must not stop the others.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
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
        residual (Tensor | float): (B,) as of `InverseRootResult`.
    """

    status: Tensor
    damping: Tensor | float
    iterations: Tensor | int
    residual: Tensor | float

    @classmethod
    def joined(cls, parts: Sequence[StackOutcome]) -> StackOutcome:
        """The outcome of consecutive parts of a stack."""
        if len(parts) == 1:
            return parts[0]
        joined = {}
        for name in ("status", "damping", "iterations", "residual"):
            values = [getattr(part, name) for part in parts]
            tensor = next((value for value in values if isinstance(value, Tensor)), None)
            joined[name] = values[0]
            if tensor is not None:
                joined[name] = torch.cat([part._of_each(name, tensor.dtype) for part in parts])
        return cls(**joined)

    def _of_each(self, name: str, dtype: torch.dtype) -> Tensor:
        """(B,) a number of each matrix."""
        number = getattr(self, name)
        if isinstance(number, Tensor):
            return number
        return torch.full_like(self.status, number, dtype=dtype)

    def result(self, value: Tensor, dtype: torch.dtype) -> InverseRootResult:
        """With the roots, and a number per block.

        Args:
            value: The roots.
            dtype: The compute dtype.

        Returns:
            The result.
        """
        return InverseRootResult(
            value=value,
            status=self.status,
            iterations=self._of_each("iterations", torch.int32),
            residual=self._of_each("residual", dtype),
            damping=self._of_each("damping", dtype),
        )


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
