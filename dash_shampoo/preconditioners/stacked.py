"""What all stacked preconditioner lists share: adoption, both views of a step, factor matrices.

Shapes: K blocks of a piece, B slots of a stack, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dash_shampoo.base import unpack
from dash_shampoo.buckets import (
    BlockSpec,
    Layout,
    MatrixStack,
    Piece,
    Rows,
    gather,
    make_layout,
    subset,
    to_blocks,
)
from dash_shampoo.inverse_root import plan_chunks
from dash_shampoo.inverse_root.blocks import divided
from dash_shampoo.preconditioners.measures import FactorMeasures, measure_in_chunks
from dash_shampoo.preconditioners.modes import unfold
from dash_shampoo.preconditioners.options import StackedOptions
from dash_shampoo.preconditioners.refresh import RefreshedList
from dash_shampoo.preconditioners.seams import BLOCK_SEAMS, LIST_SEAMS
from dash_shampoo.products import can_use_outer, exact_products
from dash_shampoo.safety import FailureLedger, is_asynchronous

if TYPE_CHECKING:
    from dash_shampoo.base import RootInvShampooPreconditionerList as _ShampooList
else:
    _ShampooList = object


class BucketView:
    """A stacked list as the base's step sees it when its gradients are bucket tensors.

    The base's step calls the two methods with whatever tensors it was given, one per piece of the
    active layout instead of one per block.

    Args:
        stacked: The list.
        step: The host's step count; the one that the base's step is given may be the device's.
    """

    def __init__(self, stacked: StackedPreconditionerList, step: Tensor) -> None:
        self._stacked, self._step = stacked, step
        self.precondition = stacked.precondition_buckets

    def update_preconditioners(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """As `StackedPreconditionerList.update_buckets`."""
        del step
        self._stacked.update_buckets(masked_grad_list, self._step, perform_amortized_computation)


class StackedPreconditionerList(RefreshedList, _ShampooList):
    """A base's Shampoo list, computed on whole buckets and stacks; to be put before the base's class.

    It is not constructed but *adopts* a list that the base has built, so that none of the base's
    arguments is repeated here; the base's state tensors become views into the stacks. It can be called
    with blocks, as the base calls its lists, and through `on_buckets` with one tensor per piece.

    Attributes:
        list_seams: What the list needs of the base's list.
        block_seams: What it needs of the base's record of a block.
        subject: What it computes of factor matrices, for messages.
    """

    list_seams: tuple[str, ...] = LIST_SEAMS
    block_seams: tuple[str, ...] = BLOCK_SEAMS
    subject: str = "inverse root"
    _is_kl = False  # whether outer products are of gradients preconditioned in all other dimensions
    _factors: tuple[MatrixStack, ...]

    @classmethod
    def adopt(
        cls,
        base_list: Any,
        block_list: Sequence[Tensor],
        block_names: Sequence[str],
        options: StackedOptions,
        group: Mapping[str, Any],
        is_compiled: bool = False,
    ) -> Self:
        """Turns the base's list into a stacked one.

        Args:
            base_list: The list as the base built it; not to be used afterwards.
            block_list: The local blocks of the group's parameters, as given to the base's list.
            block_names: For each block a name for messages.
            options: Solver and options of the stacked computation.
            group: The parameter group, for the schedule of refreshes.
            is_compiled: Whether the optimizer's step is compiled.

        Returns:
            The stacked list, whose stacks hold the state.

        Raises:
            ValueError: If the solver cannot compute what the list needs, or a block has a shape that it
                does not take.
        """
        self = cls.__new__(cls)
        self.__dict__.update(base_list.__dict__)
        self._preconditioner_config = options
        self._options = options
        self._group = group
        blocks = self._local_kronecker_factors_unwrapped
        self._check_roots({root for block in blocks for root in block.roots})
        self._layout = self._lay_out(block_list, block_names)
        self._active = self._layout.active((True,) * len(block_list))
        self._factors = self._stack_matrices("factor_matrices")
        self._ledger = FailureLedger(
            blocks,
            block_names,
            getattr(options, "num_tolerated_failed_amortized_computations", 0),
            options.safety,
            self.subject,
        )
        self._is_asynchronous = any(is_asynchronous(stack.device) for stack in self._layout.stacks)
        self._adopt_state()
        if is_compiled:
            # A handful of batched operations, and layouts that Dynamo could only guard on: not worth a
            # graph. Not a decorator, since that would import the compiler for everyone.
            for name in ("update_buckets", "update_preconditioners"):
                setattr(self, name, torch.compiler.disable(getattr(self, name)))  # type: ignore[no-untyped-call]
        return self

    # ---------------------------------------------------------------- what each list defines

    @staticmethod
    def check_method(method: Any) -> None:
        """Refuses a way to compute what the list needs that is not known.

        Args:
            method: The config of a matrix function; None for a list that computes none.

        Raises:
            ValueError: If there is none for this config.
        """

    def _check_roots(self, roots: set[float]) -> None:
        """Refuses roots that the list's method cannot compute."""

    def _lay_out(self, block_list: Sequence[Tensor], block_names: Sequence[str]) -> Layout:
        """The buckets of the blocks, and the stacks of their factor matrices.

        Raises:
            ValueError: If the list does not take a block of such a shape.
        """
        del block_names
        return make_layout(
            [
                BlockSpec(
                    tuple(block.shape),
                    selector,
                    self._roots_of(factors, selector),
                    block.dtype,
                    block.device,
                )
                for block, selector, factors in zip(
                    block_list,
                    self._local_preconditioned_dims_selector_list,
                    self._local_kronecker_factors_unwrapped,
                    strict=True,
                )
            ]
        )

    def _roots_of(self, factors: Any, selector: tuple[bool, ...]) -> tuple[float, ...]:
        """The root of every factor matrix of a block: those of different roots are not stacked."""
        del selector
        roots: tuple[float, ...] = factors.roots
        return roots

    def _adopt_state(self) -> None:
        """Stacks the state beside the factor matrices."""
        raise NotImplementedError

    def _measure(self, number: int, rows: slice) -> FactorMeasures:
        """Measures of some rows of a stack."""
        raise NotImplementedError

    def _precondition_piece(
        self, grads: Tensor, piece: Piece, skipped: int | None = None
    ) -> Tensor:
        """The preconditioned gradients of a piece, in new memory.

        Args:
            grads: (Filtered) gradients, (K, *shape).
            piece: The piece.
            skipped: The number of a factor that is left out, as KL-Shampoo asks for. (Default: None)

        Returns:
            (K, *shape) of the same dtype.
        """
        raise NotImplementedError

    def limit_(self, directions: Sequence[Tensor]) -> None:
        """Shortens directions that no gradient can have; for lists with factor matrices of gradients.

        Args:
            directions: (K, *shape) of each piece; modified.
        """

    # ----------------------------------------------------------------------------- the step

    @property
    def layout(self) -> Layout:
        """The buckets and stacks of this rank's blocks."""
        return self._layout

    def on_buckets(self, step: Tensor) -> BucketView:
        """The list for a step whose gradients are bucket tensors.

        Args:
            step: Step count, a CPU tensor.
        """
        return BucketView(self, step)

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""
        self._active = self._layout.active(tuple(local_grad_selector))

    @torch.no_grad()
    def update_buckets(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Accumulates the factor matrices and, when due, performs the amortized computation.

        Args:
            masked_grad_list: Gradients, (K, *shape) of each piece.
            step: Step count, a CPU tensor.
            perform_amortized_computation: Whether it is due.

        Raises:
            PreconditionerValueError: If a factor matrix or what is computed of it is not finite.
            ValueError: If the computation of a block failed more often in a row than is tolerated.
        """
        self._update_factor_matrices(masked_grad_list)
        self.correct_bias(step)
        if due := self.due(int(step), perform_amortized_computation):
            self._refresh(due)

    def correct_bias(self, step: Tensor) -> float:
        """Sets and gives the bias correction of the factor matrices.

        Args:
            step: Step count, a CPU tensor.
        """
        is_sum = self._beta2 == 1.0 or self._preconditioner_config.drop_weighting_factor_on_gsquare
        if self._use_bias_correction and not is_sum:
            self._bias_correction2 = torch.tensor(1.0) - self._beta2**step
        return float(self._bias_correction2)

    def precondition_buckets(self, masked_grad_list: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The preconditioned gradients of the active pieces.

        Args:
            masked_grad_list: (Filtered) gradients, (K, *shape) of each piece.

        Returns:
            Tensors of the same shapes and dtypes, in new memory.
        """
        return tuple(
            self._precondition_piece(grads, piece)
            for grads, piece in zip(masked_grad_list, self._active.pieces, strict=True)
        )

    def update_preconditioners(
        self,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """As `update_buckets`, with the gradients of the active blocks."""
        self.update_buckets(
            self._gather(masked_grad_list),
            step=step,
            perform_amortized_computation=perform_amortized_computation,
        )

    def precondition(self, masked_grad_list: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As `precondition_buckets`, with the gradients of the active blocks."""
        preconditioned = self.precondition_buckets(self._gather(masked_grad_list))
        return to_blocks(preconditioned, self._active.pieces)

    def measure(self, number: int) -> FactorMeasures:
        """Numbers of every factor matrix of a stack and of what was computed of it."""
        spec, dtype = self._layout.stacks[number], self._factors[number].data.dtype
        return measure_in_chunks(
            lambda rows: self._measure(number, rows),
            len(spec.slots),
            spec.size,
            torch.promote_types(dtype, torch.float32).itemsize,
            self._options.max_workspace_bytes,
        )

    # --------------------------------------------------------------------- what lists share

    def _gather(self, blocks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(gather(blocks, piece) for piece in self._active.pieces)

    def _stack_matrices(self, name: str, packed: bool | None = None) -> tuple[MatrixStack, ...]:
        """One stack of the matrices `name` of the base's records for each stack of the layout.

        Args:
            name: Of the attribute.
            packed: Whether they are packed; None where that is an option of the config.
        """
        blocks = self._local_kronecker_factors_unwrapped
        return tuple(
            MatrixStack(
                [getattr(blocks[index], name)[number] for index, number in stack.slots],
                stack.size,
                packed=blocks[stack.slots[0][0]].use_symmetric_packing
                if packed is None
                else packed,
            )
            for stack in self._layout.stacks
        )

    def _update_factor_matrices(self, masked_grad_list: Sequence[Tensor]) -> None:
        """F ← beta2·F + w·G₍ₖ₎G₍ₖ₎ᵀ for every piece and preconditioned dimension k."""
        is_normalized = self._options.use_dimension_normalization
        for piece, grads in zip(self._active.pieces, masked_grad_list, strict=True):
            for number, factor in enumerate(piece.bucket.factors):
                operand = self._precondition_piece(grads, piece, number) if self._is_kl else grads
                unfolded = unfold(operand, factor.dimension)
                rows = piece.factor_rows(factor)
                stack = self._factors[factor.stack]
                count, size = unfolded.shape[:2]
                length = unfolded.shape[2:].numel()
                weight = self._weighting_factor / (length if is_normalized else 1)
                is_direct = not stack.packed or can_use_outer(stack.data, unfolded)
                with exact_products(unfolded.device, size * size * length):
                    for part in (slice(0, count),) if is_direct else self._chunks(unfolded):
                        stack.accumulate_outer_(
                            subset(rows, part), unfolded[part], self._beta2, weight
                        )

    def _chunks(self, unfolded: Tensor) -> tuple[slice, ...]:
        """Rows in chunks that keep what a packed stack needs, products and triangles, under the cap."""
        num_matrices, size = unfolded.shape[:2]
        if num_matrices * size == 0:
            return ()
        return plan_chunks(
            num_matrices,
            size,
            itemsize=self._options.factor_matrix_dtype.itemsize,
            num_stacks=2,
            device_type=unfolded.device.type,
            is_serial=False,
            max_workspace_bytes=self._options.max_workspace_bytes,
            num_threads=1,
        ).rows

    @property
    def divisor(self) -> float | Tensor:
        """The bias correction of the factor matrices: the host's; the device's in a captured step."""
        # A CPU scalar, so that reading it is no device synchronisation.
        there = self._divisor_there
        return float(self._bias_correction2) if there is None else there

    def _bias_corrected(self, number: int, rows: Rows) -> Tensor:
        """The factor matrices (K, N, N) of rows of a stack; must not be modified."""
        stack = self._factors[number]
        stored = divided(stack.data[rows], self.divisor)
        matrices = unpack(stored) if stack.packed else stored
        if self._options.use_trace_scaling:
            trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=self._epsilon)
            scale = trace.pow(-self._options.trace_scaling_exponent)
            matrices = matrices * scale[:, None, None]
        return matrices
