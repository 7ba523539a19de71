"""Counting of matrix products from outside: what computes them knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class ProductCount:
    """What was multiplied while it was counted, per block of a stack of B blocks of N×N.

    Attributes:
        num_products (float): N×N by N×N products. A part of one counts by its share of the
            multiplications.
        num_symmetric (float): Those of a matrix by itself, which a triangle kernel does at half the cost.
        num_columns (float): Sum of K over products of N×N by N×K, K < N.
        num_eigendecompositions (float): Symmetric eigendecompositions.
        num_moved (float): N×N matrices that the products read and write, addends included.
        num_passes (float): N×N matrices that other operations go over, each by its largest operand.
    """

    num_products: float = 0.0
    num_symmetric: float = 0.0
    num_columns: float = 0.0
    num_eigendecompositions: float = 0.0
    num_moved: float = 0.0
    num_passes: float = 0.0


@contextmanager
def count_products(num_blocks: int, size: int) -> Iterator[ProductCount]:
    """Counts the matrix products of this thread.

    Args:
        num_blocks: B.
        size: N; products of other inner dimensions are not counted.

    Yields:
        The count, which grows while the block runs.

    Note:
        Operators are seen as they are dispatched, so a product that is split ("fp16x3") counts as its parts.

    Examples:
        >>> import torch
        >>> A = torch.ones(2, 8, 8)
        >>> with count_products(num_blocks=2, size=8) as count:
        ...     product = A @ A @ A[:, :, :3]
        >>> count.num_products, count.num_symmetric, count.num_columns
        (1.0, 1.0, 3.0)
    """
    count = ProductCount()
    with _Counter(count, num_blocks, size):
        yield count


# What touches no element, or is counted as a product.
_NO_PASSES = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach"}
_NO_PASSES |= {"symmetric_square_", "mv", "_linalg_eigh", "set_", "alias", "resize_"}
# Where an operator has its factors.
_FACTORS = {"bmm": 0, "mm": 0, "baddbmm": 1, "addmm": 1, "addmm_": 1, "baddbmm_": 1}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, count: ProductCount, num_blocks: int, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._count, self._num_blocks, self._size = count, num_blocks, size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__  # type: ignore[attr-defined]
        if name in _FACTORS:
            first = _FACTORS[name]
            left, right = args[first : first + 2]
            addends = args[:first] if (kwargs or {}).get("beta") != 0.0 else ()
            self._add(left, right, *addends)
        elif name == "symmetric_square_":
            self._add(args[1], args[1], *(() if args[2] is None else (args[2],)))
        elif name == "mv":  # a sum of stacks
            moved = args[0].numel() + args[0].shape[0]
            self._count.num_moved += moved / (self._num_blocks * self._size**2)
        elif name == "_linalg_eigh":
            self._count.num_eigendecompositions += _num_matrices(args[0]) / self._num_blocks
        result = func(*args, **(kwargs or {}))
        if not (name in _FACTORS or name in _NO_PASSES or func.is_view):  # type: ignore[attr-defined]
            elements = [t.numel() for t in (*args, result) if self._has_matrices(t)]
            self._count.num_passes += max(elements, default=0) / (self._num_blocks * self._size**2)
        return result

    def _has_matrices(self, value: Any) -> bool:
        """Whether a value holds N×N matrices, flat or not."""
        n = self._size
        if not isinstance(value, Tensor) or n < 2 or value.ndim == 0:
            return False
        return value.shape[-2:] == (n, n) or value.shape[-1] in (n**2, self._num_blocks * n**2)

    def _add(self, left: Tensor, right: Tensor, *addends: Tensor) -> None:
        n, count = self._size, self._count
        num_rows, num_columns = left.shape[-2], right.shape[-1]
        if n == 0 or left.shape[-1] != n:
            return
        matrices = _num_matrices(left) / self._num_blocks
        if max(num_rows, num_columns) == n > min(num_rows, num_columns):
            count.num_columns += matrices * min(num_rows, num_columns)
            count.num_moved += matrices
            return
        share = matrices * num_rows * num_columns / n**2
        count.num_products += share
        is_symmetric = left.data_ptr() == right.data_ptr() and left.device.type != "meta"
        count.num_symmetric += share if is_symmetric else 0.0
        operands = (left, *(() if is_symmetric else (right,)), *addends)
        count.num_moved += share + sum(t.numel() for t in operands) / (self._num_blocks * n**2)


def _num_matrices(A: Tensor) -> int:
    return A.shape[:-2].numel()
