"""The memory of the stacks: one tensor for many matrices, and the optimizer's state as views of it.

Shapes: B slots, N the size of a factor matrix, P = N(N+1)/2 the length of its packed upper triangle.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack
from torch.utils.weak import WeakIdKeyDictionary

from dash_shampoo.base import pack, packed_diagonal, unpack
from dash_shampoo.buckets.layout import Rows
from dash_shampoo.products import accumulate_outer_, can_use_outer


def stack_(tensors: Sequence[Tensor]) -> Tensor:
    """Moves tensors of one shape into one tensor (B, *shape) and makes each a view of its slot.

    There is no second copy, and everything that reads or writes the tensors (checkpoints, in-place
    loading) reads and writes the stack.

    Args:
        tensors: At least one, all of one shape, dtype and device. Their memory is released.

    Returns:
        The stack.

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"Cannot stack a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} with one "
                f"of {tuple(first.shape)} and {first.dtype}."
            )
    data = torch.stack([tensor.detach() for tensor in tensors])
    for tensor, row in zip(tensors, data.unbind(), strict=True):
        bind_(tensor, row)
    return data


# For each tensor that was bound its row, as long as the tensor lives.
_ROWS: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


class MatrixStack:
    """B symmetric N×N matrices in one tensor, full (B, N, N) or packed (B, P).

    Args:
        tensors: The B state tensors, each (N, N), or (P,) if packed; of one dtype and device. They
            become views of the stack, see `stack_`.
        size: N.
        packed: Whether the state is the packed upper triangle, row by row.

    Raises:
        ValueError: If a tensor has another shape or dtype.
    """

    def __init__(self, tensors: Sequence[Tensor], size: int, packed: bool) -> None:
        shape = (size * (size + 1) // 2,) if packed else (size, size)
        if tuple(tensors[0].shape) != shape:
            raise ValueError(
                f"Cannot stack a state tensor of shape {tuple(tensors[0].shape)}: the stack holds "
                f"{shape}."
            )
        self.size = size
        self.packed = packed
        self.data = stack_(tensors)

    def read(self, rows: Rows) -> Tensor:
        """The matrices (K, N, N): a view for a slice of a full stack, otherwise a copy."""
        stored = self.data[rows]
        return unpack(stored) if self.packed else stored

    def diagonals(self, rows: Rows) -> Tensor:
        """(K, N): a view for a slice of a full stack, otherwise a copy."""
        stored = self.data[rows]
        if not self.packed:
            return stored.diagonal(dim1=-2, dim2=-1)
        return stored.index_select(1, packed_diagonal(self.size, stored.device))

    def are_nonzero(self, rows: Rows) -> Tensor:
        """(K,) bool: which of the matrices, positive semi-definite ones, aren't zero: the diagonal isn't."""
        return self.diagonals(rows).any(-1)

    def write_(self, rows: Rows, matrices: Tensor) -> None:
        """Writes matrices (K, N, N), of which a packed stack takes the upper triangles, casting them."""
        values = pack(matrices) if self.packed else matrices
        if isinstance(rows, slice):
            self.data[rows].copy_(values)
        else:
            self.data.index_copy_(0, rows, values.to(self.data.dtype))

    def write_where_(self, chosen: Tensor, rows: Rows, matrices: Tensor) -> None:
        """Writes those of the matrices (K, N, N) that are chosen (K,); nobody waits to learn which."""
        chosen = chosen[:, None, None]
        if isinstance(rows, slice) and not self.packed and matrices.dtype == self.data.dtype:
            stored = self.data[rows]
            torch.where(chosen, matrices, stored, out=stored)
        else:
            self.write_(rows, torch.where(chosen, matrices, self.read(rows)))

    def accumulate_outer_(self, rows: slice, unfolded: Tensor, decay: float, weight: float) -> None:
        """F ← decay·F + weight·U Uᵀ, taken in the stack's dtype; by one kernel where `can_use_outer` says so.

        In a lower one, rounded before they are summed, outer products make factor matrices indefinite
        by 1e-4·λ_max, and then no root is right.

        Args:
            rows: K rows.
            unfolded: U, (K, N, M) or (K, N, M₁, M₂) with M = M₁·M₂ columns, of any dtype.
            decay: Factor of the old value.
            weight: Factor of U Uᵀ.
        """
        stored = self.data[rows]
        if can_use_outer(stored, unfolded):
            accumulate_outer_(stored, unfolded, decay, weight)
            return
        operand = unfolded.flatten(2).to(stored.dtype)
        if self.packed:
            if decay != 1.0:
                stored.mul_(decay)
            stored.add_(pack(torch.bmm(operand, operand.mT)), alpha=weight)
        else:
            stored.baddbmm_(operand, operand.mT, beta=decay, alpha=weight)


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
    # Fake tensors have no memory that could be aliased, and nobody saves them.
    alias: Tensor = row if isinstance(row, FakeTensor) else from_dlpack(row)
    tensor.set_(alias.untyped_storage(), alias.storage_offset(), row.size(), row.stride())
    _ROWS[tensor] = row


def row_of(tensor: Tensor) -> Tensor | None:
    """The row that a tensor was bound to, or None. It has left that where the two share no memory."""
    return _ROWS.get(tensor)
