"""The memory of the stacks: one tensor for many matrices, and the optimizer's state as views of it.

Shapes: B slots, N the size of a factor matrix, P = N(N+1)/2 the length of its packed upper triangle.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakIdKeyDictionary

from dash_shampoo.stacks.plan import Rows

# For each tensor that was bound its row, as long as the tensor lives.
_ROWS: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


class MatrixStack:
    """B symmetric N×N matrices in one tensor, full (B, N, N) or packed (B, P).

    The stack takes over tensors that exist already (the optimizer's state): their values are copied in
    once, and each tensor is then made a view of its slot, so that there is no second copy and everything
    that reads or writes the state (checkpoints, in-place loading) reads and writes the stack.

    Args:
        tensors: The B state tensors, each (N, N), or (P,) if packed; of one dtype and device. Their
            memory is released; they become views.
        size: N.
        packed: Whether the state is the packed upper triangle, row by row.
    """

    def __init__(self, tensors: Sequence[Tensor], size: int, packed: bool) -> None:
        shape = (size * (size + 1) // 2,) if packed else (size, size)
        for tensor in tensors:
            if tuple(tensor.shape) != shape or tensor.dtype != tensors[0].dtype:
                raise ValueError(
                    f"Cannot stack a state tensor of shape {tuple(tensor.shape)} and {tensor.dtype}: "
                    f"the stack holds {shape} of {tensors[0].dtype}."
                )
        self.size = size
        self.packed = packed
        self.data = torch.stack([tensor.detach() for tensor in tensors])
        for tensor, row in zip(tensors, self.data, strict=True):
            bind_(tensor, row)

    def rows(self, rows: Rows) -> Tensor:
        """The stored rows (K, N, N) or (K, P): a view for a slice, a copy for an index tensor."""
        return self.data[rows]

    def read(self, rows: Rows) -> Tensor:
        """The matrices (K, N, N): a view for a slice of a full stack, otherwise a copy."""
        stored = self.rows(rows)
        return unpack(stored, self.size) if self.packed else stored

    def write_(self, rows: Rows, values: Tensor) -> None:
        """Writes stored rows, or the matrices (K, N, N) of a packed stack, casting to the stack's dtype."""
        if self.packed and values.dim() == 3:
            values = pack(values)
        if isinstance(rows, slice):
            self.data[rows].copy_(values)
        else:
            self.data.index_copy_(0, rows, values.to(self.data.dtype))

    def accumulate_(self, rows: Rows, values: Tensor, decay: float, weight: float) -> None:
        """F ← decay·F + weight·values on the given rows.

        Computed as a product and a sum, like the base's foreach operators, so that the result is the
        base's to the last bit for equal `values`.

        Args:
            rows: K rows.
            values: (K, N, N), also for a packed stack.
            decay: Factor of the old value; 1.0 leaves it untouched.
            weight: Factor of `values`.
        """
        stored = self.rows(rows)
        if decay != 1.0:
            stored.mul_(decay)
        stored.add_(pack(values) if self.packed else values, alpha=weight)
        if not isinstance(rows, slice):
            self.data.index_copy_(0, rows, stored)

    def accumulate_outer_(self, rows: Rows, unfolded: Tensor, decay: float, weight: float) -> None:
        """F ← decay·F + weight·U Uᵀ in one fused operation, for a full stack.

        Args:
            rows: K rows.
            unfolded: U, (K, N, M).
            decay: Factor of the old value.
            weight: Factor of U Uᵀ.
        """
        stored = self.rows(rows)
        operand = unfolded.to(stored.dtype)
        stored.baddbmm_(operand, operand.mT, beta=decay, alpha=weight)
        if not isinstance(rows, slice):
            self.data.index_copy_(0, rows, stored)


@torch.no_grad()
def bind_(tensor: Tensor, row: Tensor) -> None:
    """Makes `tensor` share the memory of `row`, with a storage that spans just that row.

    A plain view would carry a storage offset: saving it would write the whole stack, and a DTensor over
    it could neither be saved nor deep-copied. A DLPack alias has a storage of its own that begins at the
    row; it keeps the stack alive.

    Args:
        tensor: A tensor of the row's shape, dtype and device; its own memory is released.
        row: A contiguous slice of the stack.
    """
    if row.numel() == 0:
        return
    alias: Tensor = from_dlpack(row)
    tensor.set_(alias.untyped_storage(), 0, row.size(), row.stride())
    _ROWS[tensor] = row


def row_of(tensor: Tensor) -> Tensor | None:
    """The row that a tensor was bound to, or None. It has left that where the two share no memory."""
    return _ROWS.get(tensor)


def pack(matrices: Tensor) -> Tensor:
    """Upper triangles (K, P), row by row, of symmetric matrices (K, N, N)."""
    size = matrices.size(-1)
    return matrices.reshape(-1, size * size).index_select(1, _packing(size, matrices.device)[0])


def unpack(packed: Tensor, size: int) -> Tensor:
    """Symmetric matrices (K, N, N) from upper triangles (K, P)."""
    index = _packing(size, packed.device)[1]
    return packed.index_select(1, index).view(-1, size, size)


@lru_cache(maxsize=256)
def _packing(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat indices of the upper triangle (P,), and of each entry's place in it (N²,)."""
    row, column = torch.triu_indices(size, size, device=device)
    to_packed = row * size + column
    place = torch.empty(size, size, dtype=torch.int64, device=device)
    numbers = torch.arange(to_packed.numel(), device=device)
    place[row, column] = numbers
    place[column, row] = numbers
    return to_packed, place.reshape(-1)
