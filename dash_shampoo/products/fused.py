"""The fused symmetric square on CUDA: an operator of torch, and the predicate that chooses it.

The operator `dash_shampoo::symmetric_square_` is one kernel launch. Being an operator, it is seen by dispatch
modes (counting, fake tensors); on the CPU, where nobody calls it but they, it is the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dash_shampoo.products.tiles import Tiles, can_use_kernel, library, tiles_for

# Rows of the smallest tile of the table.
_LEAST_TILE = 32
FUSED_PRECISIONS = ("fp32", "fp16x3", "tf32", "fp16", "bf16")

library.define(  # type: ignore[no-untyped-call]
    "symmetric_square_(Tensor(a!) out, Tensor S, Tensor? addends, Tensor? weights, Tensor? scale, "
    "str precision, float alpha, float beta, float shift, Tensor? factors=None, Tensor? offsets=None, "
    "Tensor(b!)? norms=None) -> ()"
)


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


def fused_square_(
    out: Tensor,
    S: Tensor,
    addends: Tensor | None,
    weights: Tensor | None,
    scale: Tensor | None,
    precision: str,
    alpha: float,
    beta: float,
    shift: float,
    factors: Tensor | None = None,
    offsets: Tensor | None = None,
    norms: Tensor | None = None,
) -> None:
    """Out ← scale·(alpha·T² + Σ_r w_r·addend_r + shift·I), T = f·S + g·I, in one launch.

    Args:
        out: (B, N, N) contiguous; exactly symmetric afterwards. May be an addend, must not overlap `S`.
        S: (B, N, N) symmetric, contiguous float32.
        addends: (R, B·N·N) with contiguous rows, or (B, N, N) contiguous; symmetric. Default: none.
        weights: (R,) w, on the device; without them there is one addend, times `beta`.
        scale: (B,) factors of the results. Default: 1.
        precision: One of `FUSED_PRECISIONS`.
        alpha: Factor of the square.
        beta: Factor of the addend, without weights.
        shift: Added to the diagonals.
        factors: (B,) f. Default: 1.
        offsets: (B,) g. Default: 0.
        norms: (B, P) as of `norm_parts`: takes the parts of the squared Frobenius norms of `out`.
    """
    torch.ops.dash_shampoo.symmetric_square_(
        out, S, addends, weights, scale, precision, alpha, beta, shift, factors, offsets, norms
    )


def norm_parts(S: Tensor) -> Tensor:
    """(B, P) zeros, into which a square of a stack adds the parts of ‖out‖²_F that its tiles have."""
    num_rows = -(-S.shape[-1] // _LEAST_TILE)
    shape = (S.shape[0], num_rows * (num_rows + 1) // 2)
    return torch.zeros(shape, dtype=S.dtype, device=S.device)


def launch_square(
    kernel: Any,
    tiles: Tiles,
    out: Tensor,
    S: Tensor,
    addends: Tensor | None,
    weights: Tensor | None,
    scale: Tensor | None,
    precision: str,
    alpha: float,
    beta: float,
    shift: float,
    factors: Tensor | None = None,
    offsets: Tensor | None = None,
    norms: Tensor | None = None,
) -> None:
    """Launch the kernel with given tiles: what the operator does, and what tests and `tools/tune.py` do.

    Args:
        kernel: `kernels.symmetric_square`.
        tiles: How it cuts.
        out: As of `fused_square_`, and so are the others.
        S: See there.
        addends: See there.
        weights: See there.
        scale: See there.
        precision: See there.
        alpha: See there.
        beta: See there.
        shift: See there.
        factors: See there.
        offsets: See there.
        norms: See there.
    """
    num_blocks, size, _ = S.shape
    num_rows = -(-size // tiles.tile)
    num_tiles = num_rows * (num_rows + 1) // 2
    num_addends = 0
    if addends is not None:
        num_addends = 1 if weights is None else weights.shape[0]
    kernel[(num_blocks * num_tiles,)](
        out,
        S,
        out if addends is None else addends,
        out if weights is None else weights,
        out if scale is None else scale,
        out if factors is None else factors,
        out if offsets is None else offsets,
        out if norms is None else norms,
        size,
        num_tiles,
        num_addends,
        0 if addends is None else addends.stride(0),
        0 if norms is None else norms.stride(0),
        int(weights is not None),
        int(scale is not None),
        int(factors is not None),
        int(offsets is not None),
        int(norms is not None),
        alpha,
        beta,
        shift,
        PRECISION=precision,
        TILE=tiles.tile,
        STEP=tiles.step,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


@torch.library.impl(library, "symmetric_square_", "CUDA")
def _on_cuda(out: Tensor, S: Tensor, *arguments: Any) -> None:
    from dash_shampoo.products import kernels  # Triton is imported by the first launch

    if S.numel() == 0:
        return
    tiles = tiles_for("square", S, arguments[3], S.shape[-1])
    # Triton launches on the current device.
    with torch.cuda.device(S.device):
        launch_square(kernels.symmetric_square, tiles, out, S, *arguments)


@torch.library.impl(library, "symmetric_square_", "Meta")
def _on_meta(*arguments: Any) -> None:
    pass
