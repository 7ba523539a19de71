"""What became of every inverse root: the host's book of failures, and what each of them leads to."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
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
    InverseRootStatus.NON_FINITE_RESULT: "the inverse root has nan or inf entries",
    InverseRootStatus.FAILED: "the solver failed",
    InverseRootStatus.INACCURATE: "the inverse root is inaccurate",
}
_ADVICE = (
    "Check the inputs and gradients for nan or inf, lower the learning rate, or raise the epsilon of "
    "the optimizer or of the grafting method; DashShampooPreconditionerConfig(safety=SafetyConfig()) "
    "handles such blocks one by one instead."
)


class BlockFactors(Protocol):
    """What the ledger reads and writes of the base's record of a block."""

    factor_matrix_indices: tuple[str, ...]
    _failed_amortized_computation_counter: int


@dataclass(frozen=True)
class _Outcome:
    slots: tuple[Slot, ...]
    status: Tensor


class FailureLedger:
    """Collects the status of every solve without reading it, and settles the accounts on request.

    Args:
        blocks: The base's records of the blocks.
        block_names: A name of each block's parameter, for messages.
        num_tolerated_failures: How many failures in a row of one block are tolerated where no safety
            config is given.
        safety: How failures are handled; None for the base's rules.
    """

    def __init__(
        self,
        blocks: Sequence[BlockFactors],
        block_names: Sequence[str],
        num_tolerated_failures: int,
        safety: SafetyConfig | None,
    ) -> None:
        self._blocks = blocks
        self._block_names = block_names
        self._num_tolerated_failures = num_tolerated_failures
        self._safety = safety
        self._pending: list[_Outcome] = []
        self._counts: Counter[int] = Counter()
        self._warned: set[int] = set()
        self._warned_of_max_iterations = False

    def record(self, slots: tuple[Slot, ...], status: Tensor) -> None:
        """Notes the outcome of a solve; reads nothing from the device.

        Args:
            slots: The slot of every matrix of the solve.
            status: (B,) `InverseRootStatus` of every matrix.
        """
        self._pending.append(_Outcome(slots, status))

    def counts(self) -> dict[str, int]:
        """How many roots were not accepted so far, by the name of the parameter."""
        named: Counter[str] = Counter()
        for block, count in self._counts.items():
            named[self._block_names[block]] += count
        return dict(named)

    def settle(self) -> list[Slot]:
        """Reads the outcomes noted since the last call (one host synchronisation) and acts on them.

        Returns:
            The slots that are still bad, for a safety policy to handle.

        Raises:
            PreconditionerValueError: If a matrix or its root is not finite (without a safety config),
                or any root is bad (policy "raise"); names the lowest such block.
            ValueError: If a block failed more often in a row than is tolerated.
        """
        outcomes, self._pending = self._pending, []
        if not outcomes:
            return []
        codes = torch.cat([outcome.status for outcome in outcomes]).tolist()
        slots = [slot for outcome in outcomes for slot in outcome.slots]
        if not any(codes):
            self._reset_failure_counters({block for block, _ in slots})
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

    def _reset_failure_counters(self, blocks: set[int]) -> None:
        for block in blocks:
            self._blocks[block]._failed_amortized_computation_counter = 0

    def _message(self, block: int, number: int, status: InverseRootStatus) -> str:
        index = self._blocks[block].factor_matrix_indices[number]
        return (
            f"Inverse root of factor matrix {index} of {self._block_names[block]}: "
            f"{_MEANING[status]}. {_ADVICE}"
        )

    def _warn_once(self, block: int, number: int, status: InverseRootStatus) -> None:
        if block not in self._warned:
            self._warned.add(block)
            logger.warning(
                "%s The previous root stays in use unless it is computed again; further failures of "
                "this block are only counted.",
                self._message(block, number, status),
            )
