"""What became of every gradient and inverse root: the host's books, and what each entry leads to."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerValueError
from dash_shampoo.buckets import Layout, Piece
from dash_shampoo.config import GradientPolicy, SafetyConfig
from dash_shampoo.inverse_root import InverseRootStatus

logger = logging.getLogger(__name__)

Slot = tuple[int, int]
"""(block index, number of the factor within its block)."""

_MEANING = {
    InverseRootStatus.NON_FINITE_INPUT: "the factor matrix has nan or inf entries",
    InverseRootStatus.NON_FINITE_RESULT: "the result has nan or inf entries",
    InverseRootStatus.FAILED: "the solver failed",
    InverseRootStatus.INACCURATE: "the result is inaccurate",
}
_BAD = "has nan or inf entries, or a sum of squares that overflows."
_ADVICE = (
    "Check the inputs and gradients for nan or inf, lower the learning rate, or raise the epsilon of "
    "the optimizer or of the grafting method; DashShampooPreconditionerConfig(safety=SafetyConfig()) "
    "handles such blocks one by one instead."
)


def is_asynchronous(device: torch.device) -> bool:
    """Whether the host would have to wait for the device in order to read a value."""
    return device.type != "cpu"


def slot_norms(tensor: Tensor) -> Tensor:
    """(K,) Frobenius norm of each slot of (K, *shape), summed in fp32 at least."""
    # Squares of fp16 overflow at 256.
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), dim=1, dtype=dtype)
    return norms


def _is_finite(grad: Tensor) -> bool:
    """Whether no sum of squares over a piece, and so over a block, overflows."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(grad, dtype=dtype))
    return norm * norm <= torch.finfo(dtype).max


class BlockFactors(Protocol):
    """What the ledger reads and writes of the base's record of a block."""

    factor_matrix_indices: tuple[str, ...]
    _failed_amortized_computation_counter: int


# ----------------------------------------------------------------------------------- gradients


class GradientGuard:
    """Keeps gradients that are not finite out of every state, on the device.

    A block whose gradient is not finite, or whose sum of squares is not, counts as a block with a
    gradient of zeros; all other blocks are bit for bit what they would have been.

    Args:
        layout: The buckets of the group's blocks, on one device.
        block_names: For each block the name of its parameter.
        block_labels: For each block "<parameter>.<block>", for messages.
        policy: What follows: the block alone is skipped, or the whole step, or an error is raised.
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
        self._first: list[int] = []
        for bucket in layout.buckets:
            self._first.append(sum(len(b.blocks) for b in layout.buckets[: bucket.number]))
        devices = {bucket.spec.device for bucket in layout.buckets}
        self._device = devices.pop() if devices else torch.device("cpu")
        self._counts = torch.zeros(len(self._blocks), dtype=torch.int64, device=self._device)
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
        if self._policy != "raise" or is_asynchronous(self._device):
            return
        seen = None
        for block, param in enumerate(params):
            grad = getattr(param.grad, "_local_tensor", param.grad)
            if param is seen or grad is None or grad.layout != torch.strided or _is_finite(grad):
                seen = param
                continue
            slot = self._blocks.index(block)
            self._counts[slot] += 1
            self._known[slot] += 1
            raise PreconditionerValueError(
                f"The gradient of {self._block_names[block]} {_BAD} No state was changed by it. "
                f"{_ADVICE}"
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
            self._counts[first + piece.start : first + piece.stop].add_(is_bad)
            tensor.masked_fill_(is_bad.view(-1, *[1] * (tensor.dim() - 1)), 0.0)
        if looks and found_bad and self._policy == "raise":
            self.has_refused = True
            self.settle()
        return not (looks and found_bad and self._policy == "skip_step")

    @property
    def must_be_read(self) -> bool:
        """Whether `settle` looks at the counts."""
        return self._policy == "raise"

    @property
    def bad_counts(self) -> Tensor:
        """How many gradients of each block were bad, on the device."""
        return self._counts

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
        counts = self._counts.cpu() if counts is None else counts
        is_new = counts > self._known
        self._known = counts.clone()
        if bool(is_new.any()):
            block = min(self._blocks[i] for i in is_new.nonzero().flatten().tolist())
            raise PreconditionerValueError(
                f"The gradient of block {self._block_labels[block]} of {self._block_names[block]} {_BAD} "
                f"No state was changed by it. {_ADVICE}"
            )

    def counts(self) -> dict[str, int]:
        """How many gradients of blocks were not finite so far, by the name of the parameter."""
        named: Counter[str] = Counter()
        for block, count in zip(self._blocks, self._counts.tolist(), strict=True):
            named[self._block_names[block]] += count
        return dict(+named)


# ------------------------------------------------------------------------------- inverse roots


@dataclass
class _Outcome:
    """The statuses of a solve, on its device or on the way to the host."""

    slots: tuple[Slot, ...]
    status: Tensor
    arrived: torch.Event | None = None

    def codes(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        codes: list[int] = self.status.tolist()
        return codes


class FailureLedger:
    """Collects the status of every solve without reading it, and settles the accounts on request.

    Args:
        blocks: The base's records of the blocks.
        block_names: A name of each block's parameter, for messages.
        num_tolerated_failures: How many failures in a row of one block are tolerated where no safety
            config is given.
        safety: How failures are handled; None for the base's rules.
        subject: What is computed of a factor matrix, for messages.
    """

    def __init__(
        self,
        blocks: Sequence[BlockFactors],
        block_names: Sequence[str],
        num_tolerated_failures: int,
        safety: SafetyConfig | None,
        subject: str = "inverse root",
    ) -> None:
        self._blocks = blocks
        self._block_names = block_names
        self._num_tolerated_failures = num_tolerated_failures
        self._subject = subject
        self._safety = safety
        self.pending: list[_Outcome] = []
        self.observer: Callable[[tuple[Slot, ...], Tensor], None] | None = None
        self._counts: Counter[int] = Counter()
        self._warned: set[int] = set()
        self._warned_of_max_iterations = False

    def record(self, slots: tuple[Slot, ...], status: Tensor) -> None:
        """Notes the outcome of a solve; reads nothing from the device.

        Args:
            slots: The slots of its matrices.
            status: (B,) `InverseRootStatus` of every matrix.
        """
        self.pending.append(_Outcome(slots, status))
        if self.observer is not None:
            self.observer(slots, status)

    def counts_by_block(self) -> Counter[int]:
        """How many roots were not accepted so far, by block; waits for pending outcomes, settles none."""
        counts = self._counts.copy()
        for outcome in self.pending:
            for (block, _), code in zip(outcome.slots, outcome.codes(), strict=True):
                counts[block] += InverseRootStatus(code) in _MEANING
        return counts

    def counts(self) -> dict[str, int]:
        """As `counts_by_block`, by the name of the parameter."""
        named: Counter[str] = Counter()
        for block, count in self.counts_by_block().items():
            named[self._block_names[block]] += count
        return dict(+named)

    def settle(self) -> list[Slot]:
        """Acts on the outcomes noted since the last call.

        Reads those that `settle_together` has not brought: a host synchronisation on an accelerator.

        Returns:
            The roots that are still bad, for a safety policy to handle.

        Raises:
            PreconditionerValueError: If a matrix or its root is not finite (without a safety config),
                or any root is bad (policy "raise"); names the lowest such block.
            ValueError: If a block failed more often in a row than is tolerated.
        """
        outcomes, self.pending = self.pending, []
        if not outcomes:
            return []
        codes = [code for one in outcomes for code in one.codes()]
        slots = [slot for one in outcomes for slot in one.slots]
        if not any(codes):
            for block, _ in slots:
                self._blocks[block]._failed_amortized_computation_counter = 0
            return []

        if InverseRootStatus.MAX_ITERATIONS in codes and not self._warned_of_max_iterations:
            self._warned_of_max_iterations = True
            logger.warning(
                "An inverse root reached the maximum number of iterations before its tolerance; it is "
                "used as it is. This is logged once."
            )
        # Later outcomes of a slot supersede earlier ones.
        latest: dict[Slot, InverseRootStatus] = {}
        for slot, code in zip(slots, codes, strict=True):
            status = InverseRootStatus(code)
            latest[slot] = status
            if status in _MEANING:
                self._counts[slot[0]] += 1
        by_block: dict[int, list[tuple[int, InverseRootStatus]]] = defaultdict(list)
        for (block, number), status in sorted(latest.items()):
            by_block[block].append((number, status))

        if self._safety is None:
            for block, statuses in by_block.items():
                self._apply_rules_of_base(block, statuses)
            return []
        return self._apply_safety(by_block)

    def _apply_rules_of_base(
        self, block: int, statuses: list[tuple[int, InverseRootStatus]]
    ) -> None:
        factors = self._blocks[block]
        failed = [number for number, s in statuses if s is InverseRootStatus.FAILED]
        for number, status in statuses:
            if status in (
                InverseRootStatus.NON_FINITE_INPUT,
                InverseRootStatus.NON_FINITE_RESULT,
                InverseRootStatus.INACCURATE,
            ):
                raise PreconditionerValueError(self._message(block, number, status))
        if not failed:
            factors._failed_amortized_computation_counter = 0
            return
        factors._failed_amortized_computation_counter += 1
        if factors._failed_amortized_computation_counter > self._num_tolerated_failures:
            raise ValueError(
                f"{self._message(block, failed[0], InverseRootStatus.FAILED)} It failed "
                f"{factors._failed_amortized_computation_counter} times in a row, more than "
                f"num_tolerated_failed_amortized_computations={self._num_tolerated_failures}."
            )
        self._warn_once(block, failed[0], InverseRootStatus.FAILED)

    def _apply_safety(self, by_block: dict[int, list[tuple[int, InverseRootStatus]]]) -> list[Slot]:
        assert self._safety is not None
        bad = []
        for block, statuses in by_block.items():
            for number, status in statuses:
                if status not in _MEANING:
                    continue
                if self._safety.policy == "raise":
                    raise PreconditionerValueError(self._message(block, number, status))
                self._warn_once(block, number, status)
                bad.append((block, number))
        return bad

    def _message(self, block: int, number: int, status: InverseRootStatus) -> str:
        index = self._blocks[block].factor_matrix_indices[number]
        return (
            f"{self._subject.capitalize()} of factor matrix {index} of {self._block_names[block]}: "
            f"{_MEANING[status]}. {_ADVICE}"
        )

    def _warn_once(self, block: int, number: int, status: InverseRootStatus) -> None:
        if block not in self._warned:
            self._warned.add(block)
            logger.warning(
                "%s The previous %s in use unless computed again; further failures of this block are "
                "only counted.",
                self._message(block, number, status),
                "root stays" if self._subject == "inverse root" else f"{self._subject} stay",
            )


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
        sizes = [len(tensors[place]) for place in places]
        joined = torch.cat([tensors[place].to(torch.int64) for place in places]).cpu()
        for place, part in zip(places, torch.split(joined, sizes), strict=True):
            on_host[place] = part
    return on_host


def send_to_host(ledger: FailureLedger) -> None:
    """Starts copying a ledger's pending statuses from an accelerator; nobody waits.

    Args:
        ledger: The ledger; its `settle` waits for what is then left of the copy.
    """
    outcomes = ledger.pending
    if not outcomes:
        return
    codes = torch.cat([outcome.status for outcome in outcomes])
    has_accelerator = torch.accelerator.is_available()
    host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=has_accelerator)
    host.copy_(codes, non_blocking=True)
    arrived = torch.Event(codes.device) if has_accelerator else None
    if arrived is not None:
        arrived.record()
    for outcome, part in zip(
        outcomes, torch.split(host, [len(o.slots) for o in outcomes]), strict=True
    ):
        outcome.status, outcome.arrived = part, arrived
