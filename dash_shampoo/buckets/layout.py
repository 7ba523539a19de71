"""Which blocks share a tensor: a pure layout of buckets, stacks and slots.

A *bucket* is a set of blocks of one shape (and dtype, device and choice of preconditioned dimensions),
so that their gradients, and everything of their shape in the state, form one tensor (K, *shape). A
*stack* holds all factor matrices of one dimension and root, across buckets; a bucket's factors for one
of its dimensions lie in K contiguous slots of a stack, in the bucket's order. Blocks of ragged shapes
simply form buckets of their own, and their factors join the stacks of their dimensions (arXiv
2602.02016, section on stacking).

Nothing here touches a tensor; `storage` holds the memory, `transfer` moves blocks in and out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from typing import overload

import torch


@dataclass(frozen=True)
class BlockSpec:
    """What the layout must know of one block.

    Attributes:
        shape: Dimensions of the block, of any order (0-d included).
        selector: One boolean per dimension: is it preconditioned.
        roots: The root p of A^(-1/p) for each preconditioned dimension, in order.
        dtype: Dtype of the block's gradient.
        device: Device of the block.
    """

    shape: tuple[int, ...]
    selector: tuple[bool, ...]
    roots: tuple[float, ...]
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if len(self.selector) != len(self.shape) or len(self.roots) != sum(self.selector):
            raise ValueError(
                f"A block of shape {self.shape} needs {len(self.shape)} selectors and one root per "
                f"selected dimension, but has selector={self.selector} and roots={self.roots}."
            )


@dataclass(frozen=True)
class FactorSlots:
    """Where a bucket keeps the factor matrices of one of its dimensions.

    Attributes:
        dimension: The mode of the block (0 for rows, 1 for columns, …).
        stack: Index of the stack in the layout.
        start: Slot of the bucket's first block; block j lies in slot start + j.
    """

    dimension: int
    stack: int
    start: int


@dataclass(frozen=True)
class Bucket:
    """Blocks of one shape.

    Attributes:
        number: Index of the bucket in the layout.
        spec: What the blocks have in common.
        blocks: Their indices in the list of blocks, ascending.
        factors: One entry per preconditioned dimension, in the order of the dimensions.
    """

    number: int
    spec: BlockSpec
    blocks: tuple[int, ...]
    factors: tuple[FactorSlots, ...]


@dataclass(frozen=True)
class StackSpec:
    """All factor matrices of one size, root and device.

    Attributes:
        size: N of the N×N factor matrices.
        root: The root p of A^(-1/p).
        device: Where the stack lies.
        slots: (block index, number of the factor within its block) for every slot.
    """

    size: int
    root: float
    device: torch.device
    slots: tuple[tuple[int, int], ...]


MAX_KEPT_SELECTIONS = 16
"""Selections of active blocks that are kept: patterns that alternate (frozen layers, experts) recur."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The buckets and stacks of a list of blocks; see `make_layout`."""

    buckets: tuple[Bucket, ...]
    stacks: tuple[StackSpec, ...]

    @cached_property
    def active(self) -> Callable[[tuple[bool, ...]], ActiveLayout]:
        """The layout restricted to the blocks with a gradient; recent selections are remembered.

        Takes one boolean per block (does it have a gradient), and gives the pieces and active stacks;
        empty ones are left out. Contiguous rows of a stack are slices.
        """
        return lru_cache(MAX_KEPT_SELECTIONS)(partial(_activate, self))

    def rows(self, number: int, slots: Sequence[int]) -> ActiveStack:
        """Some rows of a stack.

        Args:
            number: Index of the stack.
            slots: At least one, ascending.
        """
        stack = self.stacks[number]
        rows = rows_of(slots, stack.device)
        return ActiveStack(number, rows, tuple(stack.slots[slot] for slot in slots))


def make_layout(blocks: Iterable[BlockSpec]) -> Layout:
    """Groups blocks into buckets, and their factor matrices into stacks.

    The layout depends on nothing but the arguments, and keeps the order of the blocks, so that every
    process that owns the same blocks arrives at the same layout.

    Args:
        blocks: One `BlockSpec` per block.

    Returns:
        The layout. Every block is in one bucket, every factor matrix in one slot.

    Examples:
        >>> cpu = torch.device("cpu")
        >>> square = BlockSpec((8, 8), (True, True), (4.0, 4.0), torch.float32, cpu)
        >>> ragged = BlockSpec((3, 8), (True, True), (4.0, 4.0), torch.float32, cpu)
        >>> layout = make_layout([square, ragged, square])
        >>> [bucket.blocks for bucket in layout.buckets]
        [(0, 2), (1,)]
        >>> [(stack.size, len(stack.slots)) for stack in layout.stacks]
        [(8, 5), (3, 1)]
    """
    members: dict[BlockSpec, list[int]] = defaultdict(list)
    for index, block in enumerate(blocks):
        members[block].append(index)

    numbers: dict[tuple[int, float, torch.device], int] = {}
    slots: list[list[tuple[int, int]]] = []
    buckets: list[Bucket] = []
    for spec, indices in members.items():
        factors = []
        selected = [d for d, chosen in enumerate(spec.selector) if chosen]
        for factor, (dimension, root) in enumerate(zip(selected, spec.roots, strict=True)):
            stack = numbers.setdefault((spec.shape[dimension], root, spec.device), len(slots))
            if stack == len(slots):
                slots.append([])
            factors.append(FactorSlots(dimension, stack, start=len(slots[stack])))
            slots[stack].extend((index, factor) for index in indices)
        buckets.append(Bucket(len(buckets), spec, tuple(indices), tuple(factors)))

    return Layout(
        buckets=tuple(buckets),
        stacks=tuple(
            StackSpec(size, root, device, tuple(slots[number]))
            for (size, root, device), number in numbers.items()
        ),
    )


@dataclass(frozen=True)
class Piece:
    """A run of neighbouring slots of a bucket whose blocks all have a gradient in this step.

    Everything that a bucket holds, and its factor matrices in the stacks, is sliced by a piece, never
    gathered: a step works on views of the state. With all blocks active a bucket is one piece.

    Attributes:
        bucket: The bucket.
        start: First slot of the run.
        stop: End of the run.
        positions: For each of its blocks the place among all active blocks, ascending.
    """

    bucket: Bucket
    start: int
    stop: int
    positions: tuple[int, ...]

    @property
    def slots(self) -> slice:
        """The run in the tensors of the bucket."""
        return slice(self.start, self.stop)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks' indices in the list of all blocks."""
        return self.bucket.blocks[self.start : self.stop]

    def factor_rows(self, factor: FactorSlots) -> slice:
        """The run in the stack that holds one of the bucket's factors."""
        return slice(factor.start + self.start, factor.start + self.stop)


Rows = slice | torch.Tensor
"""Rows of a stack: a slice where they are contiguous, else a 1-D index tensor on the stack's device."""


@dataclass(frozen=True)
class ActiveStack:
    """The slots of a stack whose blocks have a gradient in this step.

    Attributes:
        stack: Index of the stack in the layout.
        rows: The active rows.
        slots: (block index, number of the factor within its block) of every active row.
    """

    stack: int
    rows: Rows
    slots: tuple[tuple[int, int], ...]

    def overlaps(self, piece: Piece, number: int) -> Iterator[tuple[slice, slice]]:
        """Where a piece's factors of one dimension are among these rows.

        Args:
            piece: The piece.
            number: Which of the bucket's factors.

        Yields:
            For each run of blocks that have theirs here, which of the piece's they are, and the numbers of
            these rows.
        """
        present = (i for i, block in enumerate(piece.blocks) if (block, number) in self._numbers)
        for start, stop in _runs(present):
            first = self._numbers[piece.blocks[start], number]
            yield slice(start, stop), slice(first, first + stop - start)

    @cached_property
    def _numbers(self) -> dict[tuple[int, int], int]:
        return {slot: number for number, slot in enumerate(self.slots)}


@dataclass(frozen=True, eq=False)
class ActiveLayout:
    """A layout restricted to the blocks that have a gradient; see `Layout.active`."""

    pieces: tuple[Piece, ...]
    stacks: tuple[ActiveStack, ...]
    _layout: Layout = field(repr=False)

    @cached_property
    def shares(self) -> Callable[[int], tuple[tuple[ActiveStack, ...], ...]]:
        """The active stacks, cut into shares of about the same work.

        Takes the number of shares, at least 1, and gives for each the rows of the stacks in it; empty ones
        are left out. Where a stack is cut does not depend on which blocks are active, so that a block
        stays in its share when other blocks come and go.
        """
        return cache(partial(_share, self._layout, self.stacks))


def _activate(layout: Layout, selector: Sequence[bool]) -> ActiveLayout:
    active = (index for index, is_active in enumerate(selector) if is_active)
    position = {index: place for place, index in enumerate(active)}
    pieces = tuple(
        Piece(bucket, start, stop, tuple(position[i] for i in bucket.blocks[start:stop]))
        for bucket in layout.buckets
        for start, stop in _runs(j for j, index in enumerate(bucket.blocks) if index in position)
    )
    stacks = []
    for number, stack in enumerate(layout.stacks):
        slots = [slot for slot, (index, _) in enumerate(stack.slots) if index in position]
        if slots:
            stacks.append(layout.rows(number, slots))
    return ActiveLayout(pieces, tuple(stacks), layout)


def _share(
    layout: Layout, stacks: Sequence[ActiveStack], count: int
) -> tuple[tuple[ActiveStack, ...], ...]:
    total = sum(len(stack.slots) * stack.size**3 for stack in layout.stacks)
    active = {active.stack: frozenset(active.slots) for active in stacks}
    shares: list[list[ActiveStack]] = [[] for _ in range(count)]
    done = 0
    for number, stack in enumerate(layout.stacks):
        members: dict[int, list[int]] = defaultdict(list)
        for row, slot in enumerate(stack.slots):
            # By the middle of the slot's work, in the order of stacks and slots.
            share = count * (2 * done + stack.size**3) // (2 * total) if total else 0
            done += stack.size**3
            if slot in active.get(number, ()):
                members[share].append(row)
        for share, rows in members.items():
            shares[share].append(layout.rows(number, rows))
    return tuple(map(tuple, shares))


def rows_of(slots: Sequence[int], device: torch.device) -> Rows:
    """Ascending slots as rows: a slice where they are contiguous, else an index tensor.

    Args:
        slots: At least one.
        device: Where the stack lies.

    Returns:
        The rows.
    """
    first, count = slots[0], len(slots)
    if slots[-1] == first + count - 1:
        return slice(first, first + count)
    return torch.tensor(slots, dtype=torch.int64, device=device)


@overload
def subset(rows: slice, part: slice) -> slice: ...


@overload
def subset(rows: Rows, part: slice) -> Rows: ...


def subset(rows: Rows, part: slice) -> Rows:
    """The rows number part.start to part.stop of rows.

    Args:
        rows: A slice with start and stop, or an index tensor.
        part: Which of them.

    Returns:
        Rows of the same kind.
    """
    if isinstance(rows, torch.Tensor):
        return rows[part]
    return slice(rows.start + part.start, rows.start + part.stop)


def num_rows(rows: Rows) -> int:
    """The number of rows."""
    return len(rows) if isinstance(rows, torch.Tensor) else rows.stop - rows.start


def _runs(ascending: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of consecutive numbers."""
    start = stop = -1
    for number in ascending:
        if number != stop:
            if stop >= 0:
                yield start, stop
            start = number
        stop = number + 1
    if stop >= 0:
        yield start, stop
