"""Squares of large symmetric matrices on the CPU: one triangle by blocks, the other one a copy."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a block; measured with 1 and 2 threads. A square of two blocks saves 1/4 of the products, of
# four 3/8; below that the calls cost more than they save.
_BLOCK = 256
_MIN_SIZE = 512


def can_use_triangle(S: Tensor) -> bool:
    """Whether the square of a stack (B, N, N) is faster by one triangle: large, and on the CPU."""
    return S.device.type == "cpu" and S.shape[-1] >= _MIN_SIZE


def triangular_square_(
    out: Tensor, S: Tensor, alpha: float, addend: Tensor | None, beta: float
) -> Tensor:
    """Out ← alpha·S² + beta·addend for symmetric blocks, of which one triangle is computed.

    Args:
        out: (B, N, N) stack; must not overlap `S`, may be `addend`.
        S: (B, N, N) symmetric stack.
        alpha: Factor of the square.
        addend: (B, N, N) symmetric stack, or None.
        beta: Factor of the addend.

    Returns:
        `out`, exactly symmetric but for the blocks on the diagonal, which are as symmetric as the product
        makes them.
    """
    size = S.shape[-1]
    cuts = [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
    for number, S_NN in enumerate(S):
        out_NN = out[number]
        addend_NN = out_NN if addend is None else addend[number]
        for rows in cuts:
            part = out_NN[rows, : rows.stop]
            torch.addmm(
                addend_NN[rows, : rows.stop],
                S_NN[rows],
                S_NN[:, : rows.stop],
                beta=0.0 if addend is None else beta,
                alpha=alpha,
                out=part,
            )
        for rows in cuts[1:]:
            out_NN[: rows.start, rows].copy_(out_NN[rows, : rows.start].mT)
    return out
