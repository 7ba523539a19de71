"""Batched matrix products at a stated precision, each of them counted.

Shape suffixes: A_BNN is a stack of B blocks of N×N; K is a number of columns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dash_shampoo.config import MatmulPrecision

_HALF_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

# torch has one process-wide switch for TF32 and no argument for it.
_TF32_LOCK = threading.Lock()


@dataclass
class MatmulCounter:
    """Counts batched matmuls in units of one (B, N, N) @ (B, N, N) product of the whole stack.

    Attributes:
        num_blocks (int): B, the blocks of the whole stack. Products over a part of the stack, or
            by a few columns, count by their share.
    """

    num_blocks: int
    _total_blocks: float = 0.0
    _symmetric_blocks: float = 0.0

    @property
    def total(self) -> float:
        """Products performed."""
        return self._total_blocks / max(self.num_blocks, 1)

    @property
    def symmetric(self) -> float:
        """Those of `total` whose product is symmetric by structure."""
        return self._symmetric_blocks / max(self.num_blocks, 1)

    def add(self, rows: int, *, share: float = 1.0, is_symmetric: bool = False) -> None:
        """Count one batched product over `rows` blocks.

        Args:
            rows: Number of N×N products in the batch; twice B counts as two.
            share: The product's cost relative to N×N times N×N (K / N for K columns).
            is_symmetric: Whether the product is symmetric by structure.
        """
        self._total_blocks += rows * share
        if is_symmetric:
            self._symmetric_blocks += rows * share


def round_to_tf32(A: Tensor) -> Tensor:
    """Round float32 values to TF32's 10 bits of mantissa, ties to even.

    Args:
        A: float32 tensor of any shape, finite.

    Returns:
        A new float32 tensor of the same shape.

    Examples:
        >>> round_to_tf32(torch.tensor([1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-12])).tolist()
        [1.0, 1.0009765625, 1.0]
    """
    bits = A.contiguous().view(torch.int32)
    last_kept = (bits >> 13) & 1
    return ((bits + (last_kept + 0xFFF)) & ~0x1FFF).view(torch.float32)


def is_tf32_allowed() -> bool:
    """Whether the program allows TF32 for fp32 products on CUDA."""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # the program uses the newer `fp32_precision` setting
        return bool(matmul.fp32_precision == "tf32")


@contextlib.contextmanager
def _tf32_switch(is_allowed: bool) -> Iterator[None]:
    """Set torch's process-wide TF32 switch for one product, only where it stands otherwise.

    The switch is read when the product is launched, so it is held for microseconds. Another
    thread that launches an fp32 product in this very window sees it; our own threads wait.
    """
    matmul = torch.backends.cuda.matmul
    with _TF32_LOCK:
        if is_tf32_allowed() == is_allowed:
            yield
            return
        # torch has an older and a newer setting, and refuses to read the one when the other was
        # changed alone; so the one in use is changed, and both are put back.
        fp32_precision = getattr(matmul, "fp32_precision", None)
        try:
            float32_matmul_precision = torch.get_float32_matmul_precision()
            is_legacy = isinstance(matmul.allow_tf32, bool)
        except RuntimeError:
            is_legacy = False
        try:
            if is_legacy:
                matmul.allow_tf32 = is_allowed
            else:
                matmul.fp32_precision = "tf32" if is_allowed else "ieee"
            yield
        finally:
            if is_legacy:
                torch.set_float32_matmul_precision(float32_matmul_precision)
            if fp32_precision is not None:
                matmul.fp32_precision = fp32_precision


class Matmul:
    """Batched products at one precision: rounded operands, fp32 accumulation, fp32 result.

    - "fp32": the operands' own dtype (float64 stays float64), never TF32.
    - "tf32": CUDA: TF32 tensor cores. CPU: the operands are rounded to TF32.
    - "bf16", "fp16": CUDA: half-precision operands, accumulated and returned in fp32.
      CPU, and float64 operands: the operands are rounded, then multiplied as they are.
    - "fp16x3": an operand A is split as hi + lo/2048, both fp16, which keeps 22 bits of entries
      above 6e-5 (so operands should be of size 1). Three products, hi·hi + (hi·lo + lo·hi)/2048; for
      a square two, since lo·hi = (hi·lo)ᵀ. It counts as one.

    Args:
        precision: The precision of the operands.
        counter: Where the products are counted.

    Note:
        No host sync. torch has only a process-wide switch for TF32: where it stands otherwise
        than asked for here, it is set for the launch of this one product and put back.

    Examples:
        >>> counter = MatmulCounter(num_blocks=2)
        >>> matmul = Matmul("fp32", counter)
        >>> A = torch.eye(3).expand(2, 3, 3)
        >>> torch.equal(matmul(A, A), A), counter.total
        (True, 1.0)
    """

    def __init__(self, precision: MatmulPrecision, counter: MatmulCounter) -> None:
        self.precision = precision
        self.counter = counter

    def round(self, A: Tensor) -> Tensor:
        """Round an operand to the precision; worth calling for one that is used several times.

        Args:
            A: (..., N, K) operand; one that was rounded before comes back as it is.

        Returns:
            The rounded operand, on CUDA in the half dtype itself.
        """
        if self.precision in ("fp32", "fp16x3"):
            return A
        half_dtype = _HALF_DTYPES.get(self.precision)
        if half_dtype is not None:
            if A.dtype == half_dtype:
                return A
            rounded = A.to(half_dtype)
            return rounded if _can_use_half_operands(A) else rounded.to(A.dtype)
        if A.is_cuda and A.dtype == torch.float32:
            return A  # the tensor cores round
        return round_to_tf32(A.float()).to(A.dtype)

    def __call__(
        self,
        A: Tensor,
        B: Tensor,
        *,
        is_symmetric: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """A @ B for each block.

        Args:
            A: (B, N, N) left operands, possibly rounded before.
            B: (B, N, K) right operands, possibly rounded before.
            is_symmetric: Whether the product is symmetric by structure (S·S, or U·M·U of a
                commuting pair). It is counted apart, and may be computed as one triangle.
            out: (B, N, K) tensor to write to; must not overlap the operands.

        Returns:
            (B, N, K) products in the compute dtype.
        """
        self.counter.add(
            A.shape[0], share=B.shape[-1] / max(B.shape[-2], 1), is_symmetric=is_symmetric
        )
        return self._product(self.round(A), self.round(B), out)

    def square(
        self,
        S: Tensor,
        *,
        out: Tensor,
        alpha: float = 1.0,
        addend: Tensor | None = None,
        beta: float = 1.0,
    ) -> Tensor:
        """alpha·S² + beta·addend for each block, in one pass where the precision is the operands' own.

        Below fp32 the mean μ of the diagonal is taken out before rounding, S = μI + D, and
        S² = D² + 2μS - μ²I is put together in fp32: near a multiple of the identity, rounding then
        loses a part of D instead of a part of μ.

        Args:
            S: (B, N, N) symmetric stack.
            out: (B, N, N) tensor to write to; must not overlap `S`, may be `addend`.
            alpha: Factor of the square.
            addend: (B, N, N) stack. Default: none.
            beta: Factor of the addend.

        Returns:
            `out`.
        """
        self.counter.add(S.shape[0], is_symmetric=True)
        if self.precision == "fp32":
            with self._switched(S):
                if addend is None:
                    return torch.baddbmm(out, S, S, beta=0.0, alpha=alpha, out=out)
                return torch.baddbmm(addend, S, S, beta=beta, alpha=alpha, out=out)
        if self.precision == "fp16x3":
            square = self._product(S, S, None).mul_(alpha)
        else:
            mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            D = S.clone()
            D.diagonal(dim1=-2, dim2=-1).sub_(mean[:, :, 0])
            D = self.round(D)
            square = self._product(D, D, None).mul_(alpha).addcmul_(S, 2.0 * alpha * mean)
            square.diagonal(dim1=-2, dim2=-1).sub_(alpha * mean[:, :, 0].square())
        if addend is not None:
            square.add_(addend, alpha=beta)
        return out.copy_(square)

    def _product(self, A: Tensor, B: Tensor, out: Tensor | None) -> Tensor:
        """A @ B of operands that are rounded already; not counted."""
        if self.precision == "fp16x3" and A.dtype in (torch.float32, torch.float64):
            product = _split_product(A, B)
            return product if out is None else out.copy_(product)
        if A.dtype in (torch.bfloat16, torch.float16):
            if out is None:
                return torch.bmm(A, B, out_dtype=torch.float32)
            return torch.bmm(A, B, out_dtype=torch.float32, out=out)
        with self._switched(A):
            return torch.bmm(A, B, out=out) if out is not None else torch.bmm(A, B)

    def _switched(self, A: Tensor) -> contextlib.AbstractContextManager[None]:
        """Context in which torch uses TF32 as this precision wants it."""
        if A.is_cuda and A.dtype == torch.float32:
            return _tf32_switch(self.precision == "tf32")
        return contextlib.nullcontext()

    def power(self, A: Tensor, exponent: int) -> Tensor:
        """A^exponent of symmetric blocks by repeated squaring.

        Args:
            A: (B, N, N) symmetric blocks.
            exponent: A positive integer.

        Returns:
            (B, N, N) powers; `A` itself for exponent 1.

        Note:
            floor(log2(exponent)) squarings, and one product less than the binary ones of the
            exponent. All of them are symmetric by structure.
        """
        if exponent < 1:
            raise ValueError(f"{exponent=} must be a positive integer.")
        square, result = A, None
        while True:
            if exponent & 1:
                result = square if result is None else self(result, square, is_symmetric=True)
            exponent >>= 1
            if exponent == 0:
                assert result is not None
                return result
            square = self(square, square, is_symmetric=True)


def _split_product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B by fp16 halves; a square needs two products of them instead of three."""
    half = torch.float16
    can_use_half = _can_use_half_operands(A)

    def split(X: Tensor) -> tuple[Tensor, Tensor]:
        high = X.to(half)
        low = ((X - high) * 2048.0).to(half)
        return (high, low) if can_use_half else (high.to(X.dtype), low.to(X.dtype))

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        if can_use_half:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left, right)

    A_high, A_low = split(A)
    if A is B:
        cross = multiply(A_high, A_low)
        cross = cross + cross.mT
        return multiply(A_high, A_high).add_(cross, alpha=1.0 / 2048.0)
    B_high, B_low = split(B)
    cross = multiply(A_high, B_low).add_(multiply(A_low, B_high))
    return multiply(A_high, B_high).add_(cross, alpha=1.0 / 2048.0)


def _can_use_half_operands(A: Tensor) -> bool:
    """Whether torch multiplies half-precision operands into an fp32 result on A's device."""
    return A.is_cuda and A.dtype == torch.float32 and torch.version.hip is None
