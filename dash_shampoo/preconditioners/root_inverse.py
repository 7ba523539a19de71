"""Shampoo by inverse roots, stacked: the plain method and KL-Shampoo.

Shapes: K blocks of a piece, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.base import RootInvShampooPreconditionerList
from dash_shampoo.buckets.layout import ActiveStack, Piece, Rows, num_rows, subset
from dash_shampoo.buckets.storage import MatrixStack
from dash_shampoo.inverse_root import (
    check_supported,
    config_for_root,
    repair,
    solve_stack,
    waits_for_device,
)
from dash_shampoo.preconditioners.measures import measure_roots
from dash_shampoo.preconditioners.modes import by_parts, contract
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import is_asynchronous


class StackedRootInvShampooPreconditionerList(
    StackedPreconditionerList, RootInvShampooPreconditionerList
):
    """Shampoo's preconditioners for a parameter group, computed stack by stack.

    Does what the base's sequential list does, with one batched operation where that one has a loop
    (arXiv 2602.02016):

        F ← beta2·F + w·G₍ₖ₎G₍ₖ₎ᵀ         per bucket and dimension k, G₍ₖ₎ the mode-k unfolding
        R ← (F / bias_correction2)^(-1/p)  per stack, when the amortized computation is due
        U ← G ×₁ R₁ ×₂ R₂ …               per bucket
    """

    block_seams = (*StackedPreconditionerList.block_seams, "inv_factor_matrices")
    check_method = staticmethod(check_supported)
    has_roots = True
    _inverse_factors: tuple[MatrixStack, ...]

    def _check(self, block_list: Sequence[Tensor], block_names: Sequence[str]) -> None:
        # Newton-DB has no sixth root, say: then another solver takes that stack, which is logged.
        self._solvers = [
            config_for_root(self._options.amortized_computation_config, stack.root)
            for stack in self.layout.stacks
        ]

    def _adopt_state(self) -> None:
        self._inverse_factors = self._stack_matrices("inv_factor_matrices")
        # What the solvers have added to the diagonals, for repairs.
        self._dampings = [
            torch.zeros(len(stack.slots), dtype=self._solving_dtype, device=stack.device)
            for stack in self.layout.stacks
        ]

    def damping_of(self, number: int, rows: Rows) -> Tensor:
        """What the solvers have added to the diagonals of rows of a stack."""
        return self._dampings[number][rows].clamp(min=self._epsilon)

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """U = G ×₁ R₁ ×₂ R₂ …, over the preconditioned dimensions except factor number `skipped`."""
        dtype = self._options.inv_factor_matrix_dtype
        factors = [f for number, f in enumerate(piece.bucket.factors) if number != skipped]
        if not factors:
            return grads.clone()

        def direction(grads: Tensor, part: slice, out: Tensor) -> None:
            matrices = {
                factor.dimension: self._inverse_factors[factor.stack].read(
                    subset(piece.factor_rows(factor), part)
                )
                for factor in factors
            }
            contract(grads, matrices, dtype, out)

        return by_parts(grads, direction)

    # ------------------------------------------------------------------ inverse roots

    def waits(self, due: Sequence[ActiveStack]) -> bool:
        """Whether a solver of what is due looks at the device."""
        return any(waits_for_device(self._solvers[active.stack]) for active in due)

    def _compute(self, active: ActiveStack) -> Tensor:
        """R ← F^(-1/p) on the active rows of a stack; rows that went wrong keep their previous root.

        Returns:
            The status of each row.
        """
        number, rows = active.stack, active.rows
        factors, safety = self._factors[number], self._options.safety
        # The bias is corrected by the solver, which needs no pass for it; not where the quotient is rounded.
        is_plain = factors.data.dtype == self._solving_dtype and not self._options.use_trace_scaling
        # A factor matrix of zeros has no root but that of its damping, 1e6 and more, which would
        # multiply the first gradient that comes before the next refresh.
        has_root = factors.are_nonzero(rows)

        def load(part: slice) -> Tensor:
            if is_plain:
                return factors.read(subset(rows, part))
            return self._bias_corrected(number, subset(rows, part))

        def store(part: slice, value: Tensor, usable: Tensor) -> None:
            self._write(number, subset(rows, part), value, usable & has_root[part])

        outcome = solve_stack(
            load,
            store,
            num_matrices=num_rows(rows),
            size=factors.size,
            root=self.layout.stacks[number].root,
            config=self._solvers[number],
            epsilon=self._epsilon,
            dtype=self._solving_dtype,
            device=factors.data.device,
            max_workspace_bytes=self._options.max_workspace_bytes,
            residual_threshold=None if safety is None else safety.residual_threshold,
            value_dtype=self._options.inv_factor_matrix_dtype,
            divisor=self.divisor if is_plain else 1.0,
        )
        dampings = self._dampings[number]
        if isinstance(rows, slice):
            dampings[rows] = outcome.damping
        elif isinstance(outcome.damping, Tensor):
            dampings.index_copy_(0, rows, outcome.damping)
        else:
            dampings.index_fill_(0, rows, outcome.damping)
        return outcome.status

    def _write(self, number: int, rows: Rows, value: Tensor, usable: Tensor) -> None:
        """Writes the usable roots; the other rows keep theirs."""
        # Reading a status on the CPU costs nothing; on an accelerator it would stall the queue.
        if is_asynchronous(usable.device) or not bool(usable.all()):
            self._inverse_factors[number].write_where_(usable, rows, value)
        else:
            self._inverse_factors[number].write_(rows, value)

    def _compute_again(self, bad: ActiveStack) -> None:
        number, rows = bad.stack, bad.rows
        result = repair(
            self._bias_corrected(number, rows),
            self.layout.stacks[number].root,
            self._solvers[number],
            self._epsilon,
            self._dampings[number][rows],
        )
        value = result.value.to(self._options.inv_factor_matrix_dtype)
        usable = result.is_usable & value.isfinite().flatten(1).all(1)
        self._write(number, rows, value, usable)

    def _measure(self, number: int, rows: slice) -> Tensor:
        return measure_roots(
            self._bias_corrected(number, rows),
            self._inverse_factors[number].read(rows).to(self._solving_dtype),
            self.layout.stacks[number].root,
            self._dampings[number][rows],
        )
