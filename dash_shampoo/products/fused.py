"""The fused symmetric square on CUDA: one kernel launch, its arguments, and the predicate that chooses it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dash_shampoo.products.precision import MatmulPrecision
from dash_shampoo.products.tiles import Tiles, can_use_kernel, tiles_for

# Rows of the smallest tile of the table.
_LEAST_TILE = 32
FUSED_PRECISIONS = ("fp32", "fp16x3", "tf32", "fp16", "bf16")


class SquareArguments(NamedTuple):
    """What follows `out` and the stack S (B, N, N), symmetric and contiguous float32, in a fused square.

    It is out ← scale·(alpha·T² + Σ_r w_r·addend_r + shift·I), T = f·S + g·I. `out` (B, N, N), contiguous, is
    exactly symmetric afterwards; it may be an addend, and must not overlap S.

    Attributes:
        addends (Tensor | None): (R, B·N·N) with contiguous rows, or (B, N, N) contiguous; symmetric. Or none.
        weights (Tensor | None): (R,) w, on the device; without them there is one addend, times `beta`.
        scale (Tensor | None): (B,) factors of the results; None is 1.
        precision (str): One of `FUSED_PRECISIONS`.
        alpha (float): Factor of the square.
        beta (float): Factor of the addend, without weights.
        shift (float): Added to the diagonals.
        factors (Tensor | None): (B,) f. (Default: 1)
        offsets (Tensor | None): (B,) g. (Default: 0)
        norms (Tensor | None): (B, P) as of `norm_parts`: takes the parts of the squared Frobenius norms of
            `out`.
    """

    addends: Tensor | None
    weights: Tensor | None
    scale: Tensor | None
    precision: MatmulPrecision
    alpha: float
    beta: float
    shift: float
    factors: Tensor | None = None
    offsets: Tensor | None = None
    norms: Tensor | None = None


def can_use_fused(S: Tensor, precision: str) -> bool:
    """Whether the fused kernel squares a stack: on CUDA from compute capability 8.0, where Triton is.

    In "fp32", which has no tensor cores, it saves the copies of addends and half of the multiplications: it
    pays as long as it multiplies half as fast as cuBLAS. The table says where torch's products serve.

    Args:
        S: (B, N, N) stack.
        precision: Precision of the operands.

    Returns:
        False also for stacks that are not contiguous float32, and where the table has torch's products.
    """
    return (
        precision in FUSED_PRECISIONS
        and S.dtype == torch.float32
        and S.is_contiguous()
        and can_use_kernel("square", S, precision, S.shape[-1])
    )


def norm_parts(S: Tensor) -> Tensor:
    """(B, P) zeros, into which a square of a stack adds the parts of ‖out‖²_F that its tiles have."""
    num_rows = -(-S.shape[-1] // _LEAST_TILE)
    shape = (S.shape[0], num_rows * (num_rows + 1) // 2)
    return torch.zeros(shape, dtype=S.dtype, device=S.device)


def launch_square(kernel: Any, tiles: Tiles, out: Tensor, S: Tensor, *arguments: Any) -> None:
    """Launch the kernel with given tiles: what the operator does, and what tests and `tools/tune.py` do.

    Args:
        kernel: `kernels.symmetric_square`.
        tiles: How it cuts.
        out: As of `SquareArguments`.
        S: See there.
        *arguments: Those.
    """
    a = SquareArguments(*arguments)
    num_blocks, size, _ = S.shape
    num_tiles = tiles.num_of_triangle(size)
    num_addends = 0
    if a.addends is not None:
        num_addends = 1 if a.weights is None else a.weights.shape[0]
    tensors = (a.addends, a.weights, a.scale, a.factors, a.offsets, a.norms)
    kernel[(num_blocks * num_tiles,)](
        out,
        S,
        *(out if tensor is None else tensor for tensor in tensors),
        size,
        num_tiles,
        num_addends,
        0 if a.addends is None else a.addends.stride(0),
        0 if a.norms is None else a.norms.stride(0),
        *(int(tensor is not None) for tensor in tensors[1:]),
        a.alpha,
        a.beta,
        a.shift,
        **tiles.options(a.precision),
    )


def launch_square_on_cuda(out: Tensor, S: Tensor, *arguments: Any) -> None:
    """Launch the kernel with the table's tiles; arguments as of `launch_square`."""
    from dash_shampoo.products import kernels  # Triton is imported by the first launch

    if S.numel() > 0:
        tiles = tiles_for("square", S, SquareArguments(*arguments).precision, S.shape[-1])
        launch_square(kernels.symmetric_square, tiles, out, S, *arguments)
