"""Gradients that are not finite enter no state: masked, counted and refused on their device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerValueError
from dash_shampoo.buckets.layout import Layout, Piece
from dash_shampoo.config import GradientPolicy
from dash_shampoo.safety import ADVICE, FailureLedger, is_asynchronous, slot_norms

_BAD = "has nan or inf entries, or a sum of squares that overflows."


class GradientGuard:
    """Keeps gradients that are not finite out of every state, on the device.

    A block whose gradient is not finite, or whose sum of squares is not, counts as a block with a
    gradient of zeros; all other blocks are bit for bit what they would have been.

    Args:
        layout: The buckets of the group's blocks, on one device.
        block_names: For each block the name of its parameter.
        block_labels: For each block "<parameter>.<block>", for messages.
        policy: What follows: the block alone is skipped, or the whole step, or an error is raised.

    Attributes:
        bad_counts: How many gradients of each block were bad, on the device.
        must_be_read: Whether `settle` looks at the counts.
        waits: Whether an error may be known to an accelerator alone.
        has_refused: Whether the last step was refused.
    """

    def __init__(
        self,
        layout: Layout,
        block_names: Sequence[str],
        block_labels: Sequence[str],
        policy: GradientPolicy,
    ) -> None:
        self._block_names = block_names
        self._block_labels = block_labels
        self._policy = policy
        # The blocks bucket by bucket: a piece is a slice of this order.
        self._blocks = [block for bucket in layout.buckets for block in bucket.blocks]
        sizes = [len(bucket.blocks) for bucket in layout.buckets]
        self._first = [0, *accumulate(sizes)]
        devices = {bucket.spec.device for bucket in layout.buckets}
        self._device = devices.pop() if devices else torch.device("cpu")
        self.must_be_read = policy == "raise"
        self.waits = self.must_be_read and is_asynchronous(self._device)
        self.bad_counts = torch.zeros(len(self._blocks), dtype=torch.int64, device=self._device)
        # What `settle` has seen of the counts.
        self._known = torch.zeros(len(self._blocks), dtype=torch.int64)
        self._is_checked = False
        self.has_refused = False

    def check(self, params: Sequence[Tensor]) -> None:
        """Refuses bad gradients before the step, where that raises and reading does not wait.

        Args:
            params: For each block its parameter.

        Raises:
            PreconditionerValueError: Naming the first parameter with a bad gradient.
        """
        self._is_checked = False
        if self._policy != "raise" or is_asynchronous(self._device):
            return
        seen = None
        for block, param in enumerate(params):
            grad = getattr(param.grad, "_local_tensor", param.grad)
            if param is seen or grad is None or grad.layout != torch.strided or _is_finite(grad):
                seen = param
                continue
            slot = self._blocks.index(block)
            self.bad_counts[slot] += 1
            self._known[slot] += 1
            raise PreconditionerValueError(
                f"The gradient of {self._block_names[block]} {_BAD} No state was changed by it. "
                f"{ADVICE}"
            )
        self._is_checked = True

    def mask_(self, grads: Sequence[Tensor], pieces: Sequence[Piece]) -> bool:
        """Sets bad blocks to zero and counts them.

        Args:
            grads: (K, *shape) of each piece; modified.
            pieces: The pieces.

        Returns:
            Whether the step may go on; False under the policy "skip_step".

        Raises:
            PreconditionerValueError: Under the policy "raise": at once where reading a value does not
                make the host wait, else when `settle` is called.
        """
        # On an accelerator nobody looks unless the policy needs it: masks and counts are kernels.
        looks = not is_asynchronous(self._device) or self._policy == "skip_step"
        self.has_refused = False
        is_checked, self._is_checked = self._is_checked, False
        if is_checked or (
            looks and not is_asynchronous(self._device) and all(map(_is_finite, grads))
        ):
            return True
        found_bad = False
        for tensor, piece in zip(grads, pieces, strict=True):
            is_bad = slot_norms(tensor).square_().isfinite().logical_not_()
            if looks and not bool(is_bad.any()):
                continue
            found_bad = True
            first = self._first[piece.bucket.number]
            self.bad_counts[first + piece.start : first + piece.stop].add_(is_bad)
            tensor.masked_fill_(is_bad.view(-1, *[1] * (tensor.dim() - 1)), 0.0)
        if looks and found_bad and self._policy == "raise":
            self.has_refused = True
            self.settle()
        return not (looks and found_bad and self._policy == "skip_step")

    def settle(self, counts: Tensor | None = None) -> None:
        """Raises what is due.

        Args:
            counts: The counts as they were read from the device; None reads them, a host synchronisation
                on an accelerator. (Default: None)

        Raises:
            PreconditionerValueError: Under the policy "raise", if gradients were bad since the last call.
        """
        if not self.must_be_read:
            return
        counts = self.bad_counts.cpu() if counts is None else counts
        is_new = counts > self._known
        self._known = counts.clone()
        if bool(is_new.any()):
            block = min(self._blocks[i] for i in is_new.nonzero().flatten().tolist())
            raise PreconditionerValueError(
                f"The gradient of block {self._block_labels[block]} of {self._block_names[block]} {_BAD} "
                f"No state was changed by it. {ADVICE}"
            )

    def counts(self) -> dict[str, int]:
        """How many gradients of blocks were not finite so far, by the name of the parameter."""
        named: Counter[str] = Counter()
        for block, count in zip(self._blocks, self.bad_counts.tolist(), strict=True):
            named[self._block_names[block]] += count
        return dict(+named)


def settle_together(ledgers: Sequence[FailureLedger], guards: Sequence[GradientGuard]) -> None:
    """Brings what is pending to the host, in one host synchronisation for each device.

    Args:
        ledgers: Their outcomes can then be settled without waiting.
        guards: They are settled, all of them, so that none has an old error left for a later step.

    Raises:
        PreconditionerValueError: If a gradient was not finite and that raises; the first guard's.
    """
    outcomes = [outcome for ledger in ledgers for outcome in ledger.pending]
    counting = [guard for guard in guards if guard.must_be_read]
    read = _read(
        [outcome.status for outcome in outcomes] + [guard.bad_counts for guard in counting]
    )
    for outcome, status in zip(outcomes, read[: len(outcomes)], strict=True):
        outcome.status = status
    errors: list[PreconditionerValueError] = []
    for guard, counts in zip(counting, read[len(outcomes) :], strict=True):
        try:
            guard.settle(counts)
        except PreconditionerValueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer vectors, on the CPU: those of a device are read together."""
    on_host = list(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        sizes = [tensors[place].nbytes for place in places]
        joined = torch.cat([tensors[place].view(torch.uint8) for place in places]).cpu()
        for place, part in zip(places, torch.split(joined, sizes), strict=True):
            # A copy, since numbers of several bytes have to be aligned.
            on_host[place] = part.clone().view(tensors[place].dtype)
    return on_host


def _is_finite(grad: Tensor) -> bool:
    """Whether no sum of squares over a piece, and so over a block, overflows."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(grad, dtype=dtype))
    return norm * norm <= torch.finfo(dtype).max
