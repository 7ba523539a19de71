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
        num_matmuls (float): Batched matmuls of the whole stack that were performed. A product
            over a part of the stack, or by a few columns, counts by its share.
        num_symmetric_matmuls (float): Those of `num_matmuls` whose product is symmetric by
            structure, which a triangle kernel does at half the cost.
    """

    value: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    damping: Tensor
    num_matmuls: float = 0.0
    num_symmetric_matmuls: float = 0.0

    @property
    def is_usable(self) -> Tensor:
        """(B,) bool: the blocks whose value is finite and meant to be used."""
        return self.status <= int(InverseRootStatus.MAX_ITERATIONS)


def make_result(
    value: Tensor,
    *,
    status: Tensor | None = None,
    iterations: Tensor | int = 0,
    residual: Tensor | None = None,
    damping: Tensor | float = 0.0,
    num_matmuls: float = 0.0,
    num_symmetric_matmuls: float = 0.0,
) -> InverseRootResult:
    """Build a solver's result, with the fields that it has nothing to say about filled in.

    Args:
        value: (B, N, N) inverse roots.
        status: (B,) uint8. Default: all SUCCESS.
        iterations: (B,) int32, or one number for every block. Default: 0.
        residual: (B,). Default: all NaN.
        damping: (B,), or one number for every block: what the solver added to the diagonal.
            Default: 0.
        num_matmuls: Batched matmuls performed.
        num_symmetric_matmuls: Those of them whose product is symmetric by structure.

    Returns:
        The result, on the device of `value`.
    """
    num_blocks, device = value.shape[0], value.device
    if status is None:
        status = torch.zeros(num_blocks, dtype=torch.uint8, device=device)
    if isinstance(iterations, int):
        iterations = torch.full((num_blocks,), iterations, dtype=torch.int32, device=device)
    if residual is None:
        residual = torch.full((num_blocks,), torch.nan, dtype=value.dtype, device=device)
    if not isinstance(damping, Tensor):
        damping = torch.full((num_blocks,), damping, dtype=value.dtype, device=device)
    return InverseRootResult(
        value=value,
        status=status,
        iterations=iterations,
        residual=residual,
        damping=damping,
        num_matmuls=num_matmuls,
        num_symmetric_matmuls=num_symmetric_matmuls,
    )


def concatenate_results(results: Sequence[InverseRootResult]) -> InverseRootResult:
    """Join the results of consecutive parts of a stack.

    Args:
        results: At least one, in the order of the rows, each with a (B, N, N) value.

    Returns:
        The result of the whole stack; matmuls count by the parts' shares of it.
    """
    if len(results) == 1:
        return results[0]
    rows = [len(result.status) for result in results]

    def weighted(counts: Sequence[float]) -> float:
        products = sum(count * num for count, num in zip(counts, rows, strict=True))
        return products / max(sum(rows), 1)

    return InverseRootResult(
        value=torch.cat([result.value for result in results]),
        status=torch.cat([result.status for result in results]),
        iterations=torch.cat([result.iterations for result in results]),
        residual=torch.cat([result.residual for result in results]),
        damping=torch.cat([result.damping for result in results]),
        num_matmuls=weighted([result.num_matmuls for result in results]),
        num_symmetric_matmuls=weighted([result.num_symmetric_matmuls for result in results]),
    )
