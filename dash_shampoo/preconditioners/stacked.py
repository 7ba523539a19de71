"""What all stacked preconditioner lists share: adoption, the step, factor matrices.

Shapes: K blocks of a piece, B slots of a stack, N×N factor matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from dash_shampoo.base import (
    EigendecomposedKLShampooPreconditionerConfig,
    RootInvKLShampooPreconditionerConfig,
    unpack,
)
from dash_shampoo.buckets.layout import Piece, Rows, make_layout, subset
from dash_shampoo.buckets.storage import MatrixStack
from dash_shampoo.buckets.transfer import gather, to_blocks
from dash_shampoo.inverse_root import plan_chunks
from dash_shampoo.inverse_root.blocks import divided
from dash_shampoo.preconditioners.measures import NUM_TEMPORARIES
from dash_shampoo.preconditioners.modes import unfold
from dash_shampoo.preconditioners.options import StackedOptions
from dash_shampoo.preconditioners.refresh import RefreshedList
from dash_shampoo.preconditioners.seams import BLOCK_SEAMS, LIST_SEAMS, block_specs
from dash_shampoo.products import can_use_outer, exact_products
from dash_shampoo.safety import FailureLedger, is_asynchronous

if TYPE_CHECKING:
    from dash_shampoo.base import RootInvShampooPreconditionerList as _ShampooList
else:
    _ShampooList = object

_KL_CONFIGS = (EigendecomposedKLShampooPreconditionerConfig, RootInvKLShampooPreconditionerConfig)


def leave_out_of_graphs(owner: object, *names: str) -> None:
    """Keeps methods of an object out of compiled steps.

    A handful of batched operations, and layouts that Dynamo could only guard on: not worth a graph. Not a
    decorator, since that would import the compiler for everyone.

    Args:
        owner: The object.
        *names: Of its methods.
    """
    for name in names:
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))  # type: ignore[no-untyped-call]


class StackedPreconditionerList(RefreshedList, _ShampooList):
    """A base's Shampoo list, computed on whole buckets and stacks; to be put before the base's class.

    It is not constructed but *adopts* a list that the base has built, so that none of the base's
    arguments is repeated here; the base's state tensors become views into the stacks. It is called as
    the base calls its lists, with the active blocks or with one tensor for each of their pieces.

    KL-Shampoo is the same list: only its outer products are of gradients preconditioned in all other
    dimensions.

    Attributes:
        list_seams: What the list needs of the base's list.
        block_seams: What it needs of the base's record of a block.
        subject: What it computes of factor matrices, for messages.
        method_name: Of the config's field that says how.
        check_method: Refuses such a way that is not known, by a ValueError.
        has_roots: Whether directions are multiplied by roots of factor matrices; see `limits`.
        takes_buckets: Whether it is called with tensors (K, *shape) of the active pieces, not with blocks.
        layout: The buckets and stacks of this rank's blocks.
        ledger: What became of the amortized computations.
    """

    list_seams: tuple[str, ...] = LIST_SEAMS
    block_seams: tuple[str, ...] = BLOCK_SEAMS
    subject: str = "inverse root"
    method_name: str = "amortized_computation_config"
    check_method: ClassVar[Any] = staticmethod(lambda method: None)
    has_roots = False
    takes_buckets = False
    _is_kl: bool
    _factors: tuple[MatrixStack, ...]

    @classmethod
    def adopt(
        cls,
        base_list: Any,
        block_list: Sequence[Tensor],
        block_names: Sequence[str],
        options: Any,
        group: Mapping[str, Any],
        is_compiled: bool = False,
    ) -> Self:
        """Turns the base's list into a stacked one.

        Args:
            base_list: The list as the base built it; not to be used afterwards.
            block_list: The local blocks of the group's parameters, as given to the base's list.
            block_names: For each block a name for messages.
            options: The preconditioner config, of the base or of ours.
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
        self._options = StackedOptions(options)
        self._is_kl = isinstance(options, _KL_CONFIGS)
        self._group = group
        self.layout = make_layout(block_specs(self, block_list))
        self._check(block_list, block_names)
        self._active = self.layout.active((True,) * len(block_list))
        self._factors = self._stack_matrices("factor_matrices")
        self.ledger = FailureLedger(
            self._local_kronecker_factors_unwrapped,
            block_names,
            getattr(options, "num_tolerated_failed_amortized_computations", 0),
            self._options.safety,
            self.subject,
        )
        self._is_asynchronous = any(is_asynchronous(stack.device) for stack in self.layout.stacks)
        self._adopt_state()
        if is_compiled:
            leave_out_of_graphs(self, "update_preconditioners")
        return self

    # ---------------------------------------------------------------- what each list defines

    def _check(self, block_list: Sequence[Tensor], block_names: Sequence[str]) -> None:
        """Refuses roots or blocks that the list's method cannot do, before any state is touched."""

    def _adopt_state(self) -> None:
        """Stacks the state beside the factor matrices."""
        raise NotImplementedError

    def _measure(self, number: int, rows: slice) -> Tensor:
        """Measures of some rows of a stack; see `measures`."""
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

    def damping_of(self, number: int, rows: Rows) -> Tensor | float:
        """What was added to the diagonals of rows of a stack, for which there are roots."""
        del number, rows
        return self._epsilon

    # ----------------------------------------------------------------------------- the step

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""
        self._active = self.layout.active(tuple(local_grad_selector))

    @torch.no_grad()
    def update_preconditioners(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Accumulates the factor matrices and, when due, performs the amortized computation.

        Args:
            masked_grad_list: Gradients of the active blocks, or of their pieces.
            step: Step count, a CPU tensor; in a captured step the device's, which nobody looks at.
            perform_amortized_computation: Whether it is due.

        Raises:
            PreconditionerValueError: If a factor matrix or what is computed of it is not finite.
            ValueError: If the computation of a block failed more often in a row than is tolerated.
        """
        step = step if self._step_here is None else self._step_here
        self._update(self._gather(masked_grad_list), step, perform_amortized_computation)

    def _update(self, grads: Sequence[Tensor], step: Tensor, is_due: bool) -> None:
        self._update_factor_matrices(grads)
        self.correct_bias(step)
        if due := self.due(int(step), is_due):
            self._refresh(due)

    def correct_bias(self, step: Tensor) -> float:
        """Sets and gives the bias correction of the factor matrices.

        Args:
            step: Step count, a CPU tensor.
        """
        is_sum = self._beta2 == 1.0 or self._options.drop_weighting_factor_on_gsquare
        if self._use_bias_correction and not is_sum:
            self._bias_correction2 = torch.tensor(1.0) - self._beta2**step
        return float(self._bias_correction2)

    def precondition(self, masked_grad_list: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The preconditioned gradients.

        Args:
            masked_grad_list: (Filtered) gradients of the active blocks, or of their pieces.

        Returns:
            Tensors of the same shapes and dtypes, in new memory.
        """
        grads, pieces = self._gather(masked_grad_list), self._active.pieces
        directions = tuple(map(self._precondition_piece, grads, pieces))
        return directions if self.takes_buckets else to_blocks(directions, pieces)

    def measure(self, number: int) -> Tensor:
        """(B, 4) numbers of every factor matrix of a stack and what was computed of it; see `measures`."""
        spec = self.layout.stacks[number]
        chunks = self._chunks(
            len(spec.slots), spec.size, self._solving_dtype, NUM_TEMPORARIES, spec.device
        )
        return torch.cat([self._measure(number, rows) for rows in chunks])

    # --------------------------------------------------------------------- what lists share

    def _gather(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.takes_buckets:
            return grads
        return tuple(gather(grads, piece) for piece in self._active.pieces)

    def _stack_matrices(self, name: str) -> tuple[MatrixStack, ...]:
        """One stack of the matrices `name` of the base's records for each stack of the layout."""
        records = self._local_kronecker_factors_unwrapped
        stacks = []
        for stack in self.layout.stacks:
            tensors = [getattr(records[index], name)[number] for index, number in stack.slots]
            stacks.append(MatrixStack(tensors, stack.size, packed=tensors[0].dim() == 1))
        return tuple(stacks)

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
                # Chunks keep what a packed stack needs, products and triangles, under the cap.
                parts = (
                    (slice(0, count),)
                    if is_direct
                    else self._chunks(count, size, stack.data.dtype, 2, unfolded.device)
                )
                with exact_products(unfolded.device, size * size * length):
                    for part in parts:
                        stack.accumulate_outer_(
                            subset(rows, part), unfolded[part], self._beta2, weight
                        )

    def _chunks(
        self, count: int, size: int, dtype: torch.dtype, num_stacks: int, device: torch.device
    ) -> tuple[slice, ...]:
        """Rows of a stack, as many at a time as the cap on memory allows."""
        if count * size == 0:
            return ()
        return plan_chunks(
            count,
            size,
            itemsize=dtype.itemsize,
            num_stacks=num_stacks,
            device_type=device.type,
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

    @property
    def _solving_dtype(self) -> torch.dtype:
        return torch.promote_types(self._options.factor_matrix_dtype, torch.float32)

    def _bias_corrected(self, number: int, rows: Rows) -> Tensor:
        """The factor matrices (K, N, N) of rows of a stack, in `_solving_dtype`; must not be modified."""
        stack = self._factors[number]
        stored = divided(stack.data[rows], self.divisor)
        matrices = unpack(stored) if stack.packed else stored
        if self._options.use_trace_scaling:
            trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=self._epsilon)
            scale = trace.pow(-self._options.trace_scaling_exponent)
            matrices = matrices * scale[:, None, None]
        return matrices.to(self._solving_dtype)
