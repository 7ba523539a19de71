"""The stacked preconditioner lists: Shampoo's arithmetic on whole stacks instead of block by block.

Shapes: K active blocks of a bucket, B slots of a stack, N×N factor matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from dash_shampoo.base import EigenConfig, RootInvConfig, RootInvShampooPreconditionerList
from dash_shampoo.config import DashShampooPreconditionerConfig
from dash_shampoo.failures import FailureLedger
from dash_shampoo.inverse_root import (
    InverseRootResult,
    InverseRootStatus,
    check_supported,
    inverse_root,
)
from dash_shampoo.stacks import (
    ActiveBucket,
    ActivePlan,
    BlockSpec,
    MatrixStack,
    Rows,
    StackPlan,
    activate,
    num_rows,
    plan_stacks,
    split_rows,
    unpack,
)

# How many N×N temporaries a solver holds per matrix at its peak; translates the memory cap into rows.
_SOLVER_TEMPORARIES = 8

LIST_SEAMS = (
    "_local_kronecker_factors_unwrapped",
    "_local_preconditioned_dims_selector_list",
    "_dims_list",
    "_preconditioner_config",
    "_beta2",
    "_weighting_factor",
    "_epsilon",
    "_use_bias_correction",
    "_bias_correction2",
    "_update_factor_matrices",
    "update_preconditioners",
    "precondition",
    "compress_preconditioner_list",
)
BLOCK_SEAMS = (
    "factor_matrices",
    "inv_factor_matrices",
    "factor_matrix_indices",
    "roots",
    "use_symmetric_packing",
    "_failed_amortized_computation_counter",
)


def missing_seam(base_list: object) -> str | None:
    """The first attribute that the stacked list needs and `base_list` lacks, or None."""
    for name in LIST_SEAMS:
        if not hasattr(base_list, name):
            return f"{type(base_list).__name__}.{name}"
    for block in getattr(base_list, "_local_kronecker_factors_unwrapped", ()):
        for name in BLOCK_SEAMS:
            if not hasattr(block, name):
                return f"{type(block).__name__}.{name}"
    return None


class StackedRootInvShampooPreconditionerList(RootInvShampooPreconditionerList):
    """Shampoo's preconditioners for a parameter group, computed stack by stack.

    Does what the base's sequential list does, with one batched operation where that one has a loop
    (arXiv 2602.02016):

        F ← beta2·F + w·G₍ₖ₎G₍ₖ₎ᵀ         per bucket and dimension k, G₍ₖ₎ the mode-k unfolding
        R ← (F / bias_correction2)^(-1/p)  per stack, when the amortized computation is due
        U ← G ×₁ R₁ ×₂ R₂ …               per bucket

    It is not constructed but *adopts* a list that the base has built, so that none of the base's
    arguments is repeated here; the base's state tensors become views into the stacks.
    """

    _plan: StackPlan
    _active: ActivePlan
    _factors: tuple[MatrixStack, ...]
    _inverse_factors: tuple[MatrixStack, ...]
    _options: DashShampooPreconditionerConfig
    _ledger: FailureLedger
    _num_refreshes: int

    @staticmethod
    def check_solver(solver: RootInvConfig) -> None:
        """Refuses a solver that is not known.

        Raises:
            ValueError: If there is none for this config.
        """
        check_supported(solver)

    @classmethod
    def adopt(
        cls,
        base_list: RootInvShampooPreconditionerList,
        block_list: Sequence[Tensor],
        block_names: Sequence[str],
        options: DashShampooPreconditionerConfig,
        is_compiled: bool = False,
    ) -> Self:
        """Turns the base's list into a stacked one.

        Args:
            base_list: The list as the base built it; not to be used afterwards.
            block_list: The local blocks of the group's parameters, as given to the base's list.
            block_names: For each block a name for messages.
            options: Solver and options of the stacked computation.
            is_compiled: Whether the optimizer's step is compiled.

        Returns:
            The stacked list, whose stacks hold the state.

        Raises:
            ValueError: If the solver cannot compute one of the roots.
        """
        self = cls.__new__(cls)
        self.__dict__.update(base_list.__dict__)
        self._preconditioner_config = options
        self._options = options
        blocks = self._local_kronecker_factors_unwrapped
        for root in {root for block in blocks for root in block.roots}:
            check_supported(options.amortized_computation_config, root)

        self._plan = plan_stacks(
            [
                BlockSpec(tuple(block.shape), selector, factors.roots, block.dtype, block.device)
                for block, selector, factors in zip(
                    block_list, self._local_preconditioned_dims_selector_list, blocks, strict=True
                )
            ]
        )
        self._factors = self._stack_state("factor_matrices")
        self._inverse_factors = self._stack_state("inv_factor_matrices")
        self._active = activate(self._plan, (True,) * len(block_list))
        self._num_refreshes = 0
        self._ledger = FailureLedger(
            blocks,
            block_names,
            options.num_tolerated_failed_amortized_computations,
            options.safety,
        )
        if is_compiled:
            # A handful of batched operations, and plans that Dynamo could only guard on: not worth a
            # graph. Not a decorator, since that would import the compiler for everyone.
            update = torch.compiler.disable(self.update_preconditioners)  # type: ignore[no-untyped-call]
            self.update_preconditioners = update  # type: ignore[method-assign]
        return self

    def _stack_state(self, name: str) -> tuple[MatrixStack, ...]:
        blocks = self._local_kronecker_factors_unwrapped
        return tuple(
            MatrixStack(
                [getattr(blocks[index], name)[number] for index, number in stack.slots],
                stack.size,
                packed=blocks[stack.slots[0][0]].use_symmetric_packing,
            )
            for stack in self._plan.stacks
        )

    @property
    def plan(self) -> StackPlan:
        """The buckets and stacks of this rank's blocks."""
        return self._plan

    def failure_counts(self) -> dict[str, int]:
        """How often an inverse root of a block was not accepted, by the name of its parameter."""
        self._settle()
        return self._ledger.counts()

    # ------------------------------------------------------------------ the base's contract

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""
        super().compress_preconditioner_list(local_grad_selector)
        self._active = activate(self._plan, local_grad_selector)

    @torch.no_grad()
    def update_preconditioners(
        self,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Accumulates the factor matrices and, when due, refreshes their inverse roots.

        Args:
            masked_grad_list: Gradients of the active blocks.
            step: Step count, a CPU tensor.
            perform_amortized_computation: Whether the inverse roots are due.

        Raises:
            PreconditionerValueError: If a factor matrix or its inverse root is not finite.
            ValueError: If more inverse roots of a block failed in a row than the config tolerates.
        """
        super().update_preconditioners(
            masked_grad_list=masked_grad_list, step=step, perform_amortized_computation=False
        )
        if perform_amortized_computation:
            self._refresh_inverse_roots()

    def _update_factor_matrices(self, masked_grad_list: tuple[Tensor, ...]) -> None:
        for bucket, positions, rows in self._chunks():
            grads = torch.stack([masked_grad_list[i] for i in positions])
            if self._options.safety is not None:
                grads = _zero_overflowing(grads)
            for number, (factor, factor_rows) in enumerate(
                zip(bucket.bucket.factors, rows, strict=True)
            ):
                stack = self._factors[factor.stack]
                unfolded = _unfold(
                    self._contraction_operand(grads, bucket, rows, number), factor.dimension
                )
                if self._options.use_fused_factor_update and not stack.packed:
                    stack.accumulate_outer_(
                        factor_rows, unfolded, self._beta2, self._weighting_factor
                    )
                else:
                    stack.accumulate_(
                        factor_rows,
                        torch.bmm(unfolded, unfolded.mT),
                        self._beta2,
                        self._weighting_factor,
                    )

    def _contraction_operand(
        self, grads: Tensor, bucket: ActiveBucket, rows: Sequence[Rows], number: int
    ) -> Tensor:
        """The tensor (K, *shape) whose outer products the factors number `number` accumulate."""
        del bucket, rows, number
        return grads

    def precondition(self, masked_grad_list: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Applies the inverse roots to every dimension of the gradients.

        Args:
            masked_grad_list: (Filtered) gradients of the active blocks, of any orders.

        Returns:
            The preconditioned gradients, in new memory, of the same shapes and dtypes.
        """
        directions: list[Tensor] = list(masked_grad_list)
        for bucket, positions, rows in self._chunks():
            grads = torch.stack([masked_grad_list[i] for i in positions])
            preconditioned = self._apply_inverse_roots(grads, bucket, rows)
            for position, direction in zip(positions, preconditioned.unbind(), strict=True):
                directions[position] = direction
        return tuple(directions)

    # ------------------------------------------------------------------ batched arithmetic

    def _chunks(self) -> Iterator[tuple[ActiveBucket, Sequence[int], Sequence[Rows]]]:
        """The active buckets, cut so that the factors' temporaries stay under the memory cap."""
        for bucket in self._active.buckets:
            spec = bucket.bucket.spec
            largest = max((spec.shape[f.dimension] for f in bucket.bucket.factors), default=0)
            size = self._max_rows(max(largest**2, 1), self._options.factor_matrix_dtype)
            if size >= len(bucket.positions):
                yield bucket, bucket.positions, bucket.rows
                continue
            cuts = [split_rows(rows, size) for rows in bucket.rows]
            for number, start in enumerate(range(0, len(bucket.positions), size)):
                yield (
                    bucket,
                    bucket.positions[start : start + size],
                    [cut[number] for cut in cuts],
                )

    def _max_rows(self, numel: int, dtype: torch.dtype) -> int:
        per_row = numel * dtype.itemsize * _SOLVER_TEMPORARIES
        return max(1, self._options.max_workspace_bytes // per_row)

    def _apply_inverse_roots(
        self,
        grads: Tensor,
        bucket: ActiveBucket,
        rows: Sequence[Rows],
        skipped: int | None = None,
    ) -> Tensor:
        """U = G ×₁ R₁ ×₂ R₂ … over the preconditioned dimensions except factor `skipped`.

        Every dimension in turn is contracted from the front and appended at the back, so that after
        the last one the order is the original; each contraction is one batched matmul.
        """
        dtype = self._options.inv_factor_matrix_dtype
        numbers = {factor.dimension: n for n, factor in enumerate(bucket.bucket.factors)}
        result = grads
        for dimension, size in enumerate(grads.shape[1:]):
            number = numbers.get(dimension)
            # (K, d_k, rest) → (K, rest, d_k)
            front = result.reshape(len(grads), size, _rest(grads, size)).mT
            if number is None or number == skipped:
                result = front
            else:
                factor = bucket.bucket.factors[number]
                inverse = self._inverse_factors[factor.stack].read(rows[number])
                result = torch.bmm(front.to(dtype), inverse)
        return result.reshape(grads.shape).to(grads.dtype)

    # ------------------------------------------------------------------ inverse roots

    def _refresh_inverse_roots(self) -> None:
        """R ← F^(-1/p) on every active stack; rows that went wrong keep their previous root."""
        for active in self._active.stacks:
            start = 0
            spec = self._plan.stacks[active.stack]
            size = self._max_rows(spec.size**2, self._options.factor_matrix_dtype)
            for rows in split_rows(active.rows, size):
                stop = start + num_rows(rows)
                status = self._solve(active.stack, rows, self._options.amortized_computation_config)
                self._ledger.record(active.slots[start:stop], status)
                start = stop
        self._num_refreshes += 1
        safety = self._options.safety
        if safety is None or self._num_refreshes % safety.check_interval == 0:
            self._settle()

    def _solve(self, number: int, rows: Rows, config: RootInvConfig) -> Tensor:
        """Refreshes the roots of some rows of a stack.

        Returns:
            (K,) status of each row. Only rows with a usable root are written.
        """
        safety = self._options.safety
        result = inverse_root(
            self._bias_corrected(number, rows),
            root=self._plan.stacks[number].root,
            config=config,
            epsilon=self._epsilon,
            residual_threshold=None if safety is None else safety.residual_threshold,
        )
        return self._write_usable(number, rows, result)

    def _write_usable(self, number: int, rows: Rows, result: InverseRootResult) -> Tensor:
        """Writes the roots that can be used; the other rows keep theirs.

        Returns:
            (K,) status of each row.
        """
        stack = self._inverse_factors[number]
        value = result.value.to(stack.data.dtype)
        if torch.finfo(value.dtype).max < torch.finfo(result.value.dtype).max:
            overflows = result.is_usable & ~value.isfinite().flatten(1).all(1)
            status = result.status.masked_fill(overflows, int(InverseRootStatus.NON_FINITE_RESULT))
            result = replace(result, status=status)
        usable = result.is_usable
        # Reading a status on the CPU costs nothing; on an accelerator it would stall the queue.
        if usable.is_cuda or not bool(usable.all()):
            value = torch.where(usable[:, None, None], value, stack.read(rows))
        stack.write_(rows, value)
        return result.status

    def _bias_corrected(self, number: int, rows: Rows) -> Tensor:
        """The factor matrices (K, N, N) that the roots are taken of; must not be modified."""
        stack = self._factors[number]
        stored = stack.rows(rows)
        # A CPU scalar, so that reading it is no device synchronisation.
        bias_correction = float(self._bias_correction2)
        if bias_correction != 1.0:
            stored = stored / bias_correction
        matrices = unpack(stored, stack.size) if stack.packed else stored
        if self._options.use_trace_scaling:
            trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=self._epsilon)
            scale = trace.pow(-self._options.trace_scaling_exponent)
            matrices = matrices * scale[:, None, None]
        return matrices

    def _settle(self) -> None:
        bad = self._ledger.settle()
        if bad and self._options.safety is not None and self._options.safety.policy == "eigen":
            self._solve_again_by_eigen(bad)

    def _solve_again_by_eigen(self, bad: list[tuple[int, int]]) -> None:
        """Replaces bad roots by eigendecompositions, those rows alone and batched by stack.

        They are damped as the solver would have damped them, which only the solver knows.
        """
        for number, spec in enumerate(self._plan.stacks):
            wanted = [slot for slot, member in enumerate(spec.slots) if member in set(bad)]
            if not wanted:
                continue
            rows = torch.tensor(wanted, device=spec.device)
            matrices = self._bias_corrected(number, rows).clone()
            config = self._options.amortized_computation_config
            damping = inverse_root(matrices, spec.root, config, self._epsilon).damping
            matrices.diagonal(dim1=-2, dim2=-1).add_((damping - self._epsilon)[:, None])
            again = inverse_root(matrices, spec.root, EigenConfig(), self._epsilon)
            self._write_usable(number, rows, again)


class StackedRootInvKLShampooPreconditionerList(StackedRootInvShampooPreconditionerList):
    """KL-Shampoo: the outer products are taken of gradients preconditioned in all other dimensions."""

    def _contraction_operand(
        self, grads: Tensor, bucket: ActiveBucket, rows: Sequence[Rows], number: int
    ) -> Tensor:
        return self._apply_inverse_roots(grads, bucket, rows, skipped=number)


def _unfold(blocks: Tensor, dimension: int) -> Tensor:
    """Mode-k unfoldings (K, d_k, numel / d_k) of blocks (K, *shape)."""
    size = blocks.size(dimension + 1)
    return blocks.movedim(dimension + 1, 1).reshape(len(blocks), size, _rest(blocks, size))


def _rest(blocks: Tensor, size: int) -> int:
    """The number of columns of an unfolding with `size` rows of blocks (K, *shape)."""
    return math.prod(blocks.shape[1:]) // size if size else 0


def _zero_overflowing(grads: Tensor) -> Tensor:
    """Blocks (K, *shape) with those set to zero whose sum of squares is not finite."""
    squares = grads.flatten(1).square().sum(1) if grads.dim() > 1 else grads.square()
    return torch.where(squares.isfinite().view(-1, *[1] * (grads.dim() - 1)), grads, 0.0)
