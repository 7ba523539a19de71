"""What an optimizer can tell of its blocks and factor matrices on request: `DashShampoo.diagnostics`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import DISTRIBUTOR, SHAMPOO_PRECONDITIONER_LIST
from dash_shampoo.buckets.layout import Piece
from dash_shampoo.inverse_root.result import is_usable
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import Slot, slot_norms
from dash_shampoo.step import BUCKETS

__all__ = ["HISTORY", "BlockDiagnostics", "FactorDiagnostics", "diagnose", "observe"]

HISTORY = "dash_history"
"""Key of a group's lists under which its `History` lies."""


@dataclass(frozen=True)
class FactorDiagnostics:
    """A factor matrix and what was computed of it. NaN stands for what there is not (yet).

    Attributes:
        dimension (int): The dimension of the block whose factor matrix it is.
        size (int): N of the N×N matrix.
        condition (float): Condition number of the damped matrix, as its root sees it, estimated from
            below by power iteration; of eigenvectors, by the diagonal in their basis.
        residual (float): How far what is in use is from the matrix as it is now, later steps included:
            of an inverse root ‖Xᵖ(F + damping·I)v − v‖ / ‖v‖ on a few fixed vectors, of eigenvectors
            ‖offdiag(QᵀFQ)‖ / ‖F‖.
        factor_norm (float): Frobenius norm of the matrix, bias-corrected.
        root_norm (float): Frobenius norm of its inverse root; NaN where the method has none.
        steps_since_good_root (int | None): Steps since its solver last gave a root (or eigenvectors)
            that was accepted; None if it has not since `collects_diagnostics` was set.
    """

    dimension: int
    size: int
    condition: float
    residual: float
    factor_norm: float
    root_norm: float
    steps_since_good_root: int | None


@dataclass(frozen=True)
class BlockDiagnostics:
    """A block of a parameter.

    Attributes:
        parameter (str): Name of the parameter.
        block (str): Which block of it, as in the keys of the optimizer's state.
        shape (tuple): Its shape.
        update_to_weight (float): ‖update‖ / ‖weight‖ of the last step, weight decay left out where it is
            decoupled; NaN unless `collects_diagnostics` was set then.
        failures (int): Inverse roots of it that were not accepted since the start.
        factors (tuple): Its factor matrices.
    """

    parameter: str
    block: str
    shape: tuple[int, ...]
    update_to_weight: float
    failures: int
    factors: tuple[FactorDiagnostics, ...]


class History:
    """What must be noted while a parameter group takes its steps; nothing is read from the device.

    Args:
        state_lists: The group's lists.
    """

    def __init__(self, state_lists: Mapping[str, Any]) -> None:
        self.step = 0
        self._good: dict[tuple[Slot, ...], Tensor] = {}
        self._norms: list[tuple[Piece, Tensor]] = []
        self._observed = [state_lists[BUCKETS]]
        state_lists[BUCKETS].observer = self._see_updates
        preconditioners = state_lists[SHAMPOO_PRECONDITIONER_LIST]
        if isinstance(preconditioners, StackedPreconditionerList):
            self._observed.append(preconditioners.ledger)
            preconditioners.ledger.observer = self._see_roots

    def end(self) -> None:
        """Stops observing."""
        for part in self._observed:
            part.observer = None

    def _see_roots(self, slots: tuple[Slot, ...], status: Tensor) -> None:
        last = self._good.get(slots)
        if last is None:
            last = self._good[slots] = torch.full(
                status.shape, -1, dtype=torch.int64, device=status.device
            )
        last.masked_fill_(is_usable(status), self.step)

    def _see_updates(self, updates: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        self._norms = [
            (piece, slot_norms(update)) for piece, update in zip(pieces, updates, strict=True)
        ]

    def steps_since_good(self) -> dict[Slot, int]:
        """Steps since the last accepted root of every slot that has had one."""
        found: dict[Slot, int] = {}
        for slots, steps in self._good.items():
            for slot, step in zip(slots, steps.tolist(), strict=True):
                if step >= 0:
                    found[slot] = min(self.step - step, found.get(slot, self.step))
        return found

    def update_norms(self) -> dict[int, float]:
        """Norms of the last step's updates by block."""
        return {
            block: norm
            for piece, norms in self._norms
            for block, norm in zip(piece.blocks, norms.tolist(), strict=True)
        }


def observe(state_lists: dict[str, Any], is_wanted: bool) -> None:
    """Has the step of a parameter group that begins be observed, or not any more.

    Args:
        state_lists: The group's lists, complete; the history is kept among them.
        is_wanted: Whether it shall be.
    """
    if is_wanted:
        if HISTORY not in state_lists:
            state_lists[HISTORY] = History(state_lists)
        state_lists[HISTORY].step += 1
    else:
        state_lists.pop(HISTORY).end()


@torch.no_grad()
def diagnose(
    state_lists: Mapping[str, Any], block_names: Sequence[str]
) -> Iterator[BlockDiagnostics]:
    """The blocks of a parameter group, in order.

    Args:
        state_lists: The group's lists.
        block_names: For each block the name of its parameter.

    Yields:
        One for each of this rank's blocks.
    """
    distributor, history = state_lists[DISTRIBUTOR], state_lists.get(HISTORY)
    preconditioners = state_lists[SHAMPOO_PRECONDITIONER_LIST]
    failures: Mapping[int, int] = {}
    factors: dict[int, list[FactorDiagnostics]] = {}
    if isinstance(preconditioners, StackedPreconditionerList):
        failures = preconditioners.ledger.counts_by_block()
        factors = _factors(preconditioners, history.steps_since_good() if history else {})
    updates = history.update_norms() if history else {}
    weights = torch.stack(
        [slot_norms(block[None])[0].float().cpu() for block in distributor.local_blocked_params]
        or [torch.zeros(())]
    ).tolist()
    infos = distributor.local_block_info_list
    for index, (block, info) in enumerate(
        zip(distributor.local_blocked_params, infos, strict=True)
    ):
        update, weight = updates.get(index, math.nan), weights[index]
        yield BlockDiagnostics(
            parameter=block_names[index],
            block=".".join(map(str, info.composable_block_ids)),
            shape=tuple(block.shape),
            update_to_weight=update / weight if weight > 0.0 else math.nan,
            failures=failures.get(index, 0),
            factors=tuple(sorted(factors.get(index, ()), key=lambda factor: factor.dimension)),
        )


def _factors(
    preconditioners: StackedPreconditionerList, since: Mapping[Slot, int]
) -> dict[int, list[FactorDiagnostics]]:
    """The factor matrices of every block."""
    layout = preconditioners.layout
    dimensions = {
        (block, number): factor.dimension
        for bucket in layout.buckets
        for block in bucket.blocks
        for number, factor in enumerate(bucket.factors)
    }
    found: dict[int, list[FactorDiagnostics]] = {}
    for number, spec in enumerate(layout.stacks):
        if spec.size == 0:
            continue
        for slot, row in zip(spec.slots, preconditioners.measure(number).tolist(), strict=True):
            condition, residual, factor_norm, root_norm = row
            found.setdefault(slot[0], []).append(
                FactorDiagnostics(
                    dimensions[slot],
                    spec.size,
                    condition,
                    residual,
                    factor_norm,
                    root_norm,
                    since.get(slot),
                )
            )
    return found
