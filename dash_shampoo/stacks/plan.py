"""Which blocks share a tensor: a pure plan of buckets, stacks and slots.

A *bucket* is a set of blocks of one shape (and dtype, device and choice of preconditioned dimensions),
so that their gradients form one tensor (K, *shape). A *stack* holds all factor matrices of one dimension
and root, across buckets; a bucket's factors for one of its dimensions lie in K contiguous slots of a
stack, in the bucket's order. Blocks of ragged shapes simply form buckets of their own, and their factors
join the stacks of their dimensions (arXiv 2602.02016, section on stacking).

Nothing here touches a tensor; `storage` holds the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockSpec:
    """What the plan must know of one block.

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
        stack: Index of the stack in the plan.
        start: Slot of the bucket's first block; block j lies in slot start + j.
    """

    dimension: int
    stack: int
    start: int


@dataclass(frozen=True)
class Bucket:
    """Blocks of one shape.

    Attributes:
        spec: What the blocks have in common.
        blocks: Their indices in the list of blocks, ascending.
        factors: One entry per preconditioned dimension, in the order of the dimensions.
    """

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


@dataclass(frozen=True)
class StackPlan:
    """The buckets and stacks of a list of blocks; see `plan_stacks`."""

    buckets: tuple[Bucket, ...]
    stacks: tuple[StackSpec, ...]


def plan_stacks(blocks: Sequence[BlockSpec]) -> StackPlan:
    """Groups blocks into buckets, and their factor matrices into stacks.

    The plan depends on nothing but the arguments, and keeps the order of the blocks, so that every
    process that owns the same blocks arrives at the same plan.

    Args:
        blocks: One `BlockSpec` per block.

    Returns:
        The plan. Every block is in one bucket, every factor matrix in one slot.

    Example:
        >>> cpu = torch.device("cpu")
        >>> square = BlockSpec((8, 8), (True, True), (4.0, 4.0), torch.float32, cpu)
        >>> ragged = BlockSpec((3, 8), (True, True), (4.0, 4.0), torch.float32, cpu)
        >>> plan = plan_stacks([square, ragged, square])
        >>> [bucket.blocks for bucket in plan.buckets]
        [(0, 2), (1,)]
        >>> [(stack.size, len(stack.slots)) for stack in plan.stacks]
        [(8, 5), (3, 1)]
    """
    members: dict[BlockSpec, list[int]] = {}
    for index, block in enumerate(blocks):
        members.setdefault(block, []).append(index)

    slots: dict[tuple[int, float, torch.device], list[tuple[int, int]]] = {}
    buckets = []
    for spec, indices in members.items():
        factors = []
        selected = [d for d, chosen in enumerate(spec.selector) if chosen]
        for number, (dimension, root) in enumerate(zip(selected, spec.roots, strict=True)):
            key = (spec.shape[dimension], root, spec.device)
            stack = slots.setdefault(key, [])
            factors.append(FactorSlots(dimension, stack=list(slots).index(key), start=len(stack)))
            stack.extend((index, number) for index in indices)
        buckets.append(Bucket(spec, tuple(indices), tuple(factors)))

    return StackPlan(
        buckets=tuple(buckets),
        stacks=tuple(
            StackSpec(size, root, device, tuple(members_of_stack))
            for (size, root, device), members_of_stack in slots.items()
        ),
    )


Rows = slice | torch.Tensor
"""Rows of a stack: a slice where they are contiguous, else a 1-D index tensor on the stack's device."""


@dataclass(frozen=True)
class ActiveBucket:
    """The blocks of a bucket that have a gradient in this step.

    Attributes:
        bucket: The bucket.
        positions: For each active block its place among all active blocks, ascending.
        rows: For each of the bucket's factors, the rows of its stack that belong to active blocks.
    """

    bucket: Bucket
    positions: tuple[int, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class ActiveStack:
    """The slots of a stack whose blocks have a gradient in this step.

    Attributes:
        stack: Index of the stack in the plan.
        rows: The active rows.
        slots: (block index, number of the factor within its block) of every active row.
    """

    stack: int
    rows: Rows
    slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ActivePlan:
    """A plan restricted to the blocks that have a gradient; see `activate`."""

    buckets: tuple[ActiveBucket, ...]
    stacks: tuple[ActiveStack, ...]


def activate(plan: StackPlan, selector: Sequence[bool]) -> ActivePlan:
    """Restricts a plan to the blocks with a gradient.

    Args:
        plan: The plan of all blocks.
        selector: One boolean per block: does it have a gradient.

    Returns:
        The active buckets and stacks; empty ones are left out. Contiguous rows are slices, so that with
        all blocks active no gather or scatter is needed.
    """
    position: dict[int, int] = {}
    for index, active in enumerate(selector):
        if active:
            position[index] = len(position)

    buckets = []
    for bucket in plan.buckets:
        local = [j for j, index in enumerate(bucket.blocks) if index in position]
        if local:
            buckets.append(
                ActiveBucket(
                    bucket=bucket,
                    positions=tuple(position[bucket.blocks[j]] for j in local),
                    rows=tuple(
                        _rows((factor.start + j for j in local), bucket.spec.device)
                        for factor in bucket.factors
                    ),
                )
            )

    stacks = []
    for number, stack in enumerate(plan.stacks):
        slots = [slot for slot, (index, _) in enumerate(stack.slots) if index in position]
        if slots:
            stacks.append(
                ActiveStack(
                    stack=number,
                    rows=_rows(slots, stack.device),
                    slots=tuple(stack.slots[slot] for slot in slots),
                )
            )
    return ActivePlan(tuple(buckets), tuple(stacks))


def split_rows(rows: Rows, size: int) -> list[Rows]:
    """Splits rows into chunks of at most `size`, for a bounded workspace.

    Args:
        rows: A slice with start and stop, or an index tensor.
        size: The largest chunk, at least 1.

    Returns:
        The chunks in order.
    """
    if isinstance(rows, torch.Tensor):
        return list(torch.split(rows, size))
    return [
        slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)
    ]


def num_rows(rows: Rows) -> int:
    """The number of rows."""
    return len(rows) if isinstance(rows, torch.Tensor) else rows.stop - rows.start


def _rows(slots: Iterable[int], device: torch.device) -> Rows:
    ordered = list(slots)
    first, count = ordered[0], len(ordered)
    if ordered == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(ordered, dtype=torch.int64, device=device)
