"""Which blocks of a stack still iterate: each is written once, in the step in which it is done.

A block's result is what it would have been alone; blocks that are done may be carried along for a
few steps, unread, until it pays to drop them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Dropping finished blocks copies the others, so it waits until it saves enough of the next step.
_COMPACT_BELOW = 0.8


class WorkingSet:
    """The rows of a stack that a solver still works on.

    Args:
        num_blocks: B, the rows of the whole stack.

    Attributes:
        rows (Tensor): (W,) int64 on the CPU, the stack's rows in the working set.
        is_running (Tensor): (W,) bool on the CPU, those of them that are not done.
        results (tuple): (B, ...) tensors of the whole stack, each row as it was when it was done.
    """

    def __init__(self, num_blocks: int) -> None:
        self.results: tuple[Tensor, ...] = ()
        self._num_blocks = num_blocks
        self.rows = torch.arange(num_blocks, device="cpu")
        self.is_running = torch.ones(num_blocks, dtype=torch.bool, device="cpu")

    def retire(self, wants_more: Tensor, *values: Tensor) -> None:
        """Mark as done the running rows that do not want another step, and keep what they have come to.

        Args:
            wants_more: (W,) bool on the CPU.
            *values: (W, ...) tensors of the working set, as many in every call.
        """
        finished = (self.is_running & ~wants_more).nonzero().flatten()
        self.is_running = self.is_running & wants_more
        if len(finished) == self._num_blocks:  # all of them at once
            self.results = values
        elif len(finished) > 0:
            self.results = self.results or tuple(
                value.new_empty(self._num_blocks, *value.shape[1:]) for value in values
            )
            rows = self.rows[finished].to(values[0].device)
            finished = finished.to(rows.device)
            for result, value in zip(self.results, values, strict=True):
                result[rows] = value[finished]

    @property
    def is_done(self) -> bool:
        """Whether no row is running."""
        return not bool(self.is_running.any())

    def compact(self, *stacks: Tensor) -> tuple[Tensor, ...]:
        """Drop the rows that are done from the working set, if there are enough of them.

        Args:
            *stacks: (W, ...) tensors of the working set.

        Returns:
            The same tensors, or copies without those rows.
        """
        num_running = int(self.is_running.sum())
        if num_running > _COMPACT_BELOW * len(self.rows) or not _can_move_blocks(stacks[0]):
            return stacks
        keep = self.is_running.nonzero().flatten()
        self.rows, self.is_running = self.rows[keep], self.is_running[keep]
        return tuple(stack.index_select(0, keep.to(stack.device)) for stack in stacks)


def _can_move_blocks(stack: Tensor) -> bool:
    """Whether a block's products are the same at another place in memory.

    On the CPU, MKL's kernels sum in another order for a matrix that is not aligned to 16 bytes, so
    with a size that is odd a block's last digit would depend on which others are done.
    """
    return stack.device.type != "cpu" or stack[0].numel() * stack.element_size() % 16 == 0
