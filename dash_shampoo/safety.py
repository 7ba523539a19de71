"""What became of every inverse root: the host's books, and what each entry leads to."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dash_shampoo.base import PreconditionerValueError
from dash_shampoo.config import SafetyConfig
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
ADVICE = (
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


class BlockFactors(Protocol):
    """What the ledger reads and writes of the base's record of a block."""

    factor_matrix_indices: tuple[str, ...]
    _failed_amortized_computation_counter: int


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
                counts[block] += code in _MEANING
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
        latest = dict(zip(slots, map(InverseRootStatus, codes), strict=True))
        failures: dict[int, list[tuple[int, InverseRootStatus]]] = defaultdict(list)
        for (block, number), status in sorted(latest.items()):
            failed = failures[block]  # empty where all is well
            if status in _MEANING:
                failed.append((number, status))
        self._counts.update(
            block for (block, _), code in zip(slots, codes, strict=True) if code in _MEANING
        )
        for block, failed in failures.items():
            if self._safety is None:
                self._apply_rules_of_base(block, failed)
            elif failed:
                if self._safety.policy == "raise":
                    raise PreconditionerValueError(self._message(block, *failed[0]))
                self._warn_once(block, *failed[0])
        if self._safety is None:
            return []
        return [(block, number) for block, failed in failures.items() for number, _ in failed]

    def _apply_rules_of_base(self, block: int, failed: list[tuple[int, InverseRootStatus]]) -> None:
        factors = self._blocks[block]
        for number, status in failed:
            if status is not InverseRootStatus.FAILED:
                raise PreconditionerValueError(self._message(block, number, status))
        if not failed:
            factors._failed_amortized_computation_counter = 0
            return
        factors._failed_amortized_computation_counter += 1
        if factors._failed_amortized_computation_counter > self._num_tolerated_failures:
            raise ValueError(
                f"{self._message(block, *failed[0])} It failed "
                f"{factors._failed_amortized_computation_counter} times in a row, more than "
                f"num_tolerated_failed_amortized_computations={self._num_tolerated_failures}."
            )
        self._warn_once(block, *failed[0])

    def _message(self, block: int, number: int, status: InverseRootStatus) -> str:
        index = self._blocks[block].factor_matrix_indices[number]
        return (
            f"{self._subject.capitalize()} of factor matrix {index} of {self._block_names[block]}: "
            f"{_MEANING[status]}. {ADVICE}"
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
