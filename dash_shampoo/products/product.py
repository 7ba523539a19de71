"""Batched products at one precision.

Shape suffixes: A_BNN is a stack of B blocks of N×N; K is a number of columns.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.products.fused import SquareArguments, can_use_fused, launch_square_on_cuda
from dash_shampoo.products.identity import has_identity, multiple_of_identity
from dash_shampoo.products.precision import (
    HALVES,
    SPLIT_SCALE,
    MatmulPrecision,
    is_tf32_allowed,
    rounded,
    split,
    tf32_switch,
)
from dash_shampoo.products.tiles import are_kernels_assumed, operator
from dash_shampoo.products.triangle import can_use_triangle, triangular_square_


class Products:
    """Batched products at one precision: rounded operands, fp32 accumulation, fp32 result.

    - "fp32": the operands' own dtype (float64 stays float64), never TF32.
    - "tf32": CUDA: TF32 tensor cores. CPU: the operands are rounded to TF32.
    - "bf16", "fp16": CUDA: half-precision operands, accumulated and returned in fp32.
      CPU, and float64 operands: the operands are rounded, then multiplied as they are.
    - "fp16x3": an operand A is split as hi + lo/2048, both fp16, which keeps 22 bits of entries
      above 6e-5 (so operands should be of size 1). Three products, hi·hi + (hi·lo + lo·hi)/2048; for
      a square two, since lo·hi = (hi·lo)ᵀ.

    Args:
        precision: The precision of the operands.

    Note:
        No host sync. torch has only a process-wide switch for TF32 on CUDA: where it stands otherwise
        than asked for here, it is set for the launch of this one product and put back. On the CPU a
        solve runs under `exact_products`.

    Examples:
        >>> A = torch.eye(3).expand(2, 3, 3)
        >>> torch.equal(Products("fp32")(A, A), A)
        True
    """

    def __init__(self, precision: MatmulPrecision) -> None:
        self.precision = precision

    @classmethod
    def with_tf32(cls, A: Tensor, *, is_wanted: bool) -> Products:
        """In TF32 where that is wanted, the program allows it, and A is float32 on CUDA; else "fp32"."""
        can_use = is_wanted and A.is_cuda and A.dtype == torch.float32 and is_tf32_allowed()
        return cls("tf32" if can_use else "fp32")

    def round(self, A: Tensor) -> Tensor:
        """Round an operand to the precision; worth calling for one that is used several times.

        Args:
            A: (..., N, K) operand; one that was rounded before comes back as it is.

        Returns:
            The rounded operand, on CUDA in the half dtype itself.
        """
        return rounded(A, self.precision)

    def __call__(
        self, A: Tensor, B: Tensor, *, out: Tensor | None = None, alpha: float = 1.0
    ) -> Tensor:
        """alpha·A @ B for each block.

        Args:
            A: (B, N, N) left operands, possibly rounded before.
            B: (B, N, K) right operands, possibly rounded before.
            out: (B, N, K) tensor to write to; must not overlap the operands.
            alpha: Factor of the product.

        Returns:
            (B, N, K) products in the compute dtype.
        """
        if self.precision == "fp32" and alpha != 1.0:
            with self._switched(A):
                out = A.new_empty(*A.shape[:2], B.shape[2]) if out is None else out
                return torch.baddbmm(out, A, B, beta=0.0, alpha=alpha, out=out)
        product = self._product(self.round(A), self.round(B), out)
        return product if alpha == 1.0 else product.mul_(alpha)

    def add_to_(self, C: Tensor, A: Tensor, B: Tensor, *, alpha: float = 1.0) -> Tensor:
        """C ← C + alpha·A @ B for each block, in place.

        Args:
            C: (B, N, K) in the compute dtype.
            A: (B, N, N) left operands, possibly rounded before.
            B: (B, N, K) right operands, possibly rounded before.
            alpha: Factor of the product.

        Returns:
            `C`.
        """
        if self.precision == "fp32":
            with self._switched(A):
                return C.baddbmm_(A, B, alpha=alpha)
        return C.add_(self(A, B), alpha=alpha)

    def square(
        self,
        S: Tensor,
        *,
        out: Tensor | None = None,
        alpha: float = 1.0,
        addend: Tensor | None = None,
        beta: float | Tensor = 1.0,
        shift: float = 0.0,
        scale: Tensor | None = None,
        factors: Tensor | None = None,
        offsets: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> Tensor:
        """scale·(alpha·T² + beta·addend + shift·I) of symmetric blocks, T = f·S + g·I.

        Where `can_use_fused` says so, on CUDA, it is one kernel. Elsewhere T is made first,
        a square in fp32 is one pass, and a large one on the CPU is computed as one triangle. In "tf32",
        "fp16" and "bf16" the mean μ of the diagonal is taken out before rounding, S = μI + D, and
        S² = D² + 2μS - μ²I is put together in fp32: near a multiple of the identity, rounding then
        loses a part of D instead of a part of μ.

        Args:
            S: (B, N, N) symmetric stack; in "fp16" its entries should be of size 1.
            out: (B, N, N) contiguous tensor to write to; must not overlap `S`, may be `addend`. Default: a
                new one.
            alpha: Factor of the square.
            addend: (B, N, N) symmetric stack, or several as (R, B·N·N) with contiguous rows. Default: none.
            beta: Factor of the addend, or of several (R,).
            shift: Added to the diagonals.
            scale: (B,) factors of the results. Default: 1.
            factors: (B,) f; what is then of size 1 is T. Default: T = S.
            offsets: (B,) g, with factors. Default: 0.
            norms: (B, P) as of `norm_parts`: the sum of each row becomes the squared Frobenius norm of that
                result. Only where the square is one kernel.

        Returns:
            `out`, as symmetric as the device's product of a matrix by itself; exactly by the fused kernel.
        """
        out = torch.empty_like(S) if out is None else out
        if self.can_fuse(S):
            weights, factor = (beta, 1.0) if isinstance(beta, Tensor) else (None, beta)
            numbers = (self.precision, alpha, factor, shift)
            fused_square_(out, S, addend, weights, scale, *numbers, factors, offsets, norms)
            return out
        if factors is not None:
            S = _prepared(S, factors, offsets)
        return self._reference_square(S, out, alpha, addend, beta, shift, scale)

    def _reference_square(
        self,
        S: Tensor,
        out: Tensor,
        alpha: float,
        addend: Tensor | None,
        beta: float | Tensor,
        shift: float,
        scale: Tensor | None,
    ) -> Tensor:
        """`square` by torch's products."""
        if isinstance(beta, Tensor):
            assert addend is not None
            weighted_sum(addend, beta, out.view(-1))
            addend, beta = out, 1.0
        if self.precision == "fp32" and can_use_triangle(S):
            triangular_square_(out, S, alpha, addend, beta)
        elif self.precision == "fp32":
            is_wanted = shift != 0.0 and beta != 0.0 and S.device.type != "cpu"
            if addend is not None and addend is not out and is_wanted and has_identity(S):
                # A kernel less: baddbmm would copy the addend by one of its own.
                identity = multiple_of_identity(S.shape[-1], 1.0, S.dtype, S.device)
                addend = torch.add(addend, identity, alpha=shift / beta, out=out)
                shift = 0.0
            with self._switched(S):
                if addend is None:
                    torch.baddbmm(out, S, S, beta=0.0, alpha=alpha, out=out)
                else:
                    torch.baddbmm(addend, S, S, beta=beta, alpha=alpha, out=out)
        else:
            square = self._rounded_square(S).mul_(alpha)
            if addend is not None:
                square.add_(addend, alpha=beta)
            out.copy_(square)
        if shift != 0.0:
            out.diagonal(dim1=-2, dim2=-1).add_(shift)
        return out if scale is None else out.mul_(scale[:, None, None])

    def can_fuse(self, S: Tensor) -> bool:
        """Whether `square` is one kernel for a stack, and its result exactly symmetric."""
        return can_use_fused(S, self.precision)

    def power(self, A: Tensor, exponent: int) -> Tensor:
        """A^exponent of symmetric blocks by repeated squaring.

        Args:
            A: (B, N, N) symmetric blocks.
            exponent: A positive integer.

        Returns:
            (B, N, N) powers; `A` itself for exponent 1.

        Raises:
            ValueError: If the exponent is below 1.

        Note:
            floor(log2(exponent)) squarings, and one product less than the binary ones of the
            exponent.
        """
        if exponent < 1:
            raise ValueError(f"{exponent=} must be a positive integer.")
        square, result = A, None
        while True:
            if exponent & 1:
                result = square if result is None else self(result, square)
            exponent >>= 1
            if exponent == 0:
                assert result is not None
                return result
            square = self.square(square) if self.precision == "fp32" else self(square, square)

    def _rounded_square(self, S: Tensor) -> Tensor:
        """S² below fp32."""
        if self.precision == "fp16x3":
            return self._product(S, S, None)
        mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        D = S.clone()
        D.diagonal(dim1=-2, dim2=-1).sub_(mean[:, :, 0])
        D = self.round(D)
        square = self._product(D, D, None).addcmul_(S, 2.0 * mean)
        square.diagonal(dim1=-2, dim2=-1).sub_(mean[:, :, 0].square())
        return square

    def _product(self, A: Tensor, B: Tensor, out: Tensor | None) -> Tensor:
        """A @ B of operands that are rounded already."""
        if self.precision == "fp16x3" and A.dtype in (torch.float32, torch.float64):
            product = _split_product(A, B)
            return product if out is None else out.copy_(product)
        with self._switched(A):
            return _bmm(A, B, out)

    def _switched(self, A: Tensor) -> contextlib.AbstractContextManager[None]:
        """Context in which torch uses TF32 as this precision wants it."""
        if A.is_cuda and A.dtype == torch.float32:
            return tf32_switch(self.precision == "tf32")
        return contextlib.nullcontext()


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """Out ← Σ_r weights_r·rows_r.

    Args:
        rows: (R, L), each row contiguous.
        weights: (R,).
        out: (L,).
    """
    if rows.device.type != "cpu" or are_kernels_assumed():
        torch.mv(rows.mT, weights, out=out)
        return
    # oneDNN, which `exact_products` may choose, takes six times as long for a product with a vector.
    first, *others = weights.tolist()
    torch.mul(rows[0], first, out=out)
    for row, weight in zip(rows[1:], others, strict=True):
        out.add_(row, alpha=weight)


def _prepared(S: Tensor, factors: Tensor, offsets: Tensor | None) -> Tensor:
    """f·S + g·I of each block."""
    T = S * factors[:, None, None]
    if offsets is not None:
        T.diagonal(dim1=-2, dim2=-1).add_(offsets[:, None])
    return T


def _bmm(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """A @ B; of halves in fp32."""
    if A.dtype in HALVES:
        return torch.bmm(A, B, out_dtype=torch.float32, out=out)
    return torch.bmm(A, B, out=out)


def _split_product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B by fp16 halves; a square needs two products of them instead of three."""
    A_high, A_low = split(A)
    if A is B:
        cross = _bmm(A_high, A_low)
        cross = cross + cross.mT
        return _bmm(A_high, A_high).add_(cross, alpha=1.0 / SPLIT_SCALE)
    B_high, B_low = split(B)
    cross = _bmm(A_high, B_low).add_(_bmm(A_low, B_high))
    return _bmm(A_high, B_high).add_(cross, alpha=1.0 / SPLIT_SCALE)


def _square_on_cpu(out: Tensor, S: Tensor, *arguments: Any) -> None:
    a = SquareArguments(*arguments)
    if a.factors is not None:
        S = _prepared(S, a.factors, a.offsets)
    factor = a.beta if a.weights is None else a.weights
    products = Products(a.precision)
    products._reference_square(S, out, a.alpha, a.addends, factor, a.shift, a.scale)
    if a.norms is not None:
        a.norms[:, 0] = torch.linalg.vector_norm(out.flatten(1), dim=1).square()


fused_square_ = operator(
    "symmetric_square_(Tensor(a!) out, Tensor S, Tensor? addends, Tensor? weights, Tensor? scale, "
    "str precision, float alpha, float beta, float shift, Tensor? factors=None, Tensor? offsets=None, "
    "Tensor(b!)? norms=None) -> ()",
    launch_square_on_cuda,
    _square_on_cpu,
)
"""`SquareArguments` after `out` and S, in one launch."""
