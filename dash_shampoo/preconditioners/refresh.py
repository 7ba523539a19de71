"""What of a list is refreshed when, and what follows from the outcomes.

A refresh is what the device computes, then what the host notes of it. A step that is replayed repeats the
first alone, so the two are apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dash_shampoo.buckets.layout import ActiveLayout, ActiveStack, Layout
from dash_shampoo.preconditioners.options import StackedOptions
from dash_shampoo.safety import FailureLedger, Slot, send_to_host

Outcomes = list[tuple[tuple[Slot, ...], Tensor]]
"""Slots, and the status of each on its device."""


class RefreshedList:
    """The amortized computation of a stacked list: its schedule, its outcomes, its repairs."""

    layout: Layout
    ledger: FailureLedger
    _active: ActiveLayout
    _options: StackedOptions
    _group: Mapping[str, Any]
    _is_asynchronous: bool
    # Of a step that is being captured: its count, the bias correction on the device, the outcomes.
    _step_here: Tensor | None = None
    _divisor_there: Tensor | None = None
    _captured: Outcomes | None = None
    _known_bad: Sequence[Slot] = ()

    # ---------------------------------------------------------------- what each list defines

    def _compute(self, active: ActiveStack) -> Tensor:
        """The amortized computation on the active rows of a stack, which writes what can be used.

        Returns:
            The status of each row.
        """
        raise NotImplementedError

    def _compute_again(self, bad: ActiveStack) -> None:
        """Computes bad rows of a stack anew, by a surer method."""
        raise NotImplementedError

    # ------------------------------------------------------------------------- the schedule

    def due(self, step: int, is_due: bool) -> Sequence[ActiveStack]:
        """What is to be refreshed in a step: every active stack, or with `stagger_refresh` a share.

        Args:
            step: Step count.
            is_due: Whether the base's schedule has a refresh in this step.
        """
        frequency = self._group["precondition_frequency"]
        is_staggered = self._options.stagger_refresh and frequency > 1
        if is_staggered and step > self._group["start_preconditioning_step"]:
            return self._active.shares(frequency)[step % frequency]
        return self._active.stacks if is_due else ()

    def _refresh(self, due: Sequence[ActiveStack]) -> None:
        """The amortized computation on what is due; rows that went wrong keep what they had."""
        known_bad, self._known_bad = self.known_bad(), ()
        outcomes = [(active.slots, self._compute(active)) for active in due]
        self._repair(known_bad)
        if self._captured is None:
            self.note(outcomes)
        else:
            self._captured.extend(outcomes)

    def known_bad(self) -> Sequence[Slot]:
        """What the next refresh must repair, where outcomes are acted on late; waits for their arrival.

        Raises:
            PreconditionerValueError: As of `settle`, and so is the other.
            ValueError: See there.
        """
        if self._settles_late:
            self._known_bad = [*self._known_bad, *self._settled()]
        return self._known_bad

    def note(self, outcomes: Outcomes) -> None:
        """The host's part of a refresh: notes what became of it, and acts on it where it is known.

        Args:
            outcomes: Of the rows that were computed.
        """
        for slots, status in outcomes:
            self.ledger.record(slots, status)
        if self._settles_late:
            send_to_host(self.ledger)
        elif not self.waits_for_settlement:
            self.settle()

    @contextmanager
    def captured(self, step: Tensor, divisor: Tensor | None) -> Iterator[Outcomes]:
        """A step that leaves to the host what is the host's.

        Args:
            step: The host's step count.
            divisor: The bias correction of the factor matrices, a scalar on the device; None for 1.

        Yields:
            The outcomes of its refreshes, to be noted after every replay.
        """
        self._step_here, self._divisor_there, self._captured = step, divisor, []
        try:
            yield self._captured
        finally:
            self._step_here = self._divisor_there = self._captured = None

    def waits(self, due: Sequence[ActiveStack]) -> bool:
        """Whether the host waits for the device in a step by the nature of what is computed.

        Args:
            due: What is refreshed in it.
        """
        return bool(due)

    def settle(self) -> None:
        """Acts on the outcomes of the amortized computations since the last call.

        Raises:
            PreconditionerValueError: If a factor matrix or what was computed of it is not finite, or
                anything is bad under the safety policy "raise".
            ValueError: If the computation of a block failed more often in a row than is tolerated.
        """
        self._repair(self._settled())

    def _settled(self) -> Sequence[Slot]:
        """Settles the ledger; gives what the safety config wants computed again."""
        bad, safety = self.ledger.settle(), self._options.safety
        return bad if safety is not None and safety.policy == "repair" else ()

    def _repair(self, bad: Sequence[Slot]) -> None:
        """Computes anew what went wrong, those rows alone."""
        members = set(bad)
        for number, spec in enumerate(self.layout.stacks if members else ()):
            wanted = [row for row, slot in enumerate(spec.slots) if slot in members]
            if wanted:
                self._compute_again(self.layout.rows(number, wanted))

    # ------------------------------------------------------------------------- the outcomes

    @property
    def waits_for_settlement(self) -> bool:
        """Whether outcomes wait on an accelerator for being settled at the end of the step."""
        return self._is_asynchronous and not self._settles_late and bool(self.ledger.pending)

    @property
    def _settles_late(self) -> bool:
        """Whether outcomes are acted on at the next refresh, so that nobody waits for them."""
        return self._is_asynchronous and self._options.safety is not None
