"""What of a list is refreshed when, and what follows from the outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dash_shampoo.buckets import ActiveLayout, ActiveStack, Layout, Rows, rows_of
from dash_shampoo.preconditioners.options import StackedOptions
from dash_shampoo.safety import FailureLedger, Slot, send_to_host


class RefreshedList:
    """The amortized computation of a stacked list: its schedule, its outcomes, its repairs."""

    _layout: Layout
    _active: ActiveLayout
    _options: StackedOptions
    _group: Mapping[str, Any]
    _ledger: FailureLedger
    _is_asynchronous: bool

    # ---------------------------------------------------------------- what each list defines

    def _compute(self, active: ActiveStack) -> Tensor:
        """The amortized computation on the active rows of a stack, which writes what can be used.

        Returns:
            The status of each row.
        """
        raise NotImplementedError

    def _compute_again(self, number: int, rows: Rows) -> None:
        """Computes bad rows of a stack anew, by a surer method."""
        raise NotImplementedError

    # ------------------------------------------------------------------------- the schedule

    def _due(self, step: int, is_due: bool) -> Sequence[ActiveStack]:
        """What is to be refreshed in a step: every active stack, or with `stagger_refresh` a share."""
        frequency = self._group["precondition_frequency"]
        is_staggered = self._options.stagger_refresh and frequency > 1
        if is_staggered and step > self._group["start_preconditioning_step"]:
            return self._active.shares(frequency)[step % frequency]
        return self._active.stacks if is_due else ()

    def _refresh(self, due: Sequence[ActiveStack]) -> None:
        """The amortized computation on what is due; rows that went wrong keep what they had."""
        known_bad = self._ledger.settle() if self._settles_late else []
        for active in due:
            self._ledger.record(active.slots, self._compute(active))
        if self._settles_late:
            self._repair(known_bad)
            send_to_host(self._ledger)
        elif not self.waits_for_settlement:
            self.settle()

    def settle(self) -> None:
        """Acts on the outcomes of the amortized computations since the last call.

        Raises:
            PreconditionerValueError: If a factor matrix or what was computed of it is not finite, or
                anything is bad under the safety policy "raise".
            ValueError: If the computation of a block failed more often in a row than is tolerated.
        """
        self._repair(self._ledger.settle())

    def _repair(self, bad: Sequence[Slot]) -> None:
        """Computes anew what went wrong, those rows alone, where the safety config wants it."""
        safety, members = self._options.safety, set(bad)
        if not bad or safety is None or safety.policy != "repair":
            return
        for number, spec in enumerate(self._layout.stacks):
            wanted = [slot for slot, member in enumerate(spec.slots) if member in members]
            if wanted:
                self._compute_again(number, rows_of(wanted, spec.device))

    # ------------------------------------------------------------------------- the outcomes

    def failure_counts(self) -> dict[str, int]:
        """How often the amortized computation of a block was not accepted, by parameter."""
        return self._ledger.counts()

    @property
    def ledger(self) -> FailureLedger:
        """What became of the amortized computations."""
        return self._ledger

    @property
    def waits_for_settlement(self) -> bool:
        """Whether outcomes wait on an accelerator for being settled at the end of the step."""
        return self._is_asynchronous and not self._settles_late and bool(self._ledger.pending)

    @property
    def _settles_late(self) -> bool:
        """Whether outcomes are acted on at the next refresh, so that nobody waits for them."""
        return self._is_asynchronous and self._options.safety is not None
