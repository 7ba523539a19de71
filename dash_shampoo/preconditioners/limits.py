"""Directions without grafting, where a root is that of round-off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.buckets.layout import Piece
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import is_asynchronous, slot_norms

# F is quadratic in G: with exponents that sum to 1/2 a direction's size is free of the gradient's scale.
_NEUTRAL_EXPONENT = 0.5


@torch.no_grad()
def limit_(lists: StackedPreconditionerList, directions: Sequence[Tensor]) -> None:
    """Shortens directions that no gradient in the factor matrices could have, of undamped blocks.

    With exponents that sum to 1/2, whatever has entered F ← β₂F + w·GGᵀ with weight w gets a direction of
    at most √(numel/w). What has not entered it (F is of lower rank, and its root some steps old) is
    multiplied by damping^(-1/p): meant so where the damping is above the round-off of F, and else by
    whatever eigenvalues the round-off has, 10⁶ and more with the base's default epsilon. Only directions
    that are too long *and* of such a block are changed.

    Args:
        lists: The list that made them.
        directions: (K, *shape) of each piece; modified.
    """
    options = lists._options
    if not lists.has_roots or lists._epsilon == 0.0:  # where a pseudo-inverse truncates
        return
    # Scaled factor matrices make directions of any size.
    if options.use_trace_scaling or options.use_dimension_normalization:
        return
    for direction, piece in zip(directions, lists._active.pieces, strict=True):
        factors = piece.bucket.factors
        exponent = sum(1 / lists.layout.stacks[factor.stack].root for factor in factors)
        if lists._is_kl and len(factors) > 1:
            continue
        if not factors or not math.isclose(exponent, _NEUTRAL_EXPONENT, abs_tol=1e-6):
            continue
        # √(numel/w), w the weight of a gradient in the bias-corrected factor matrices.
        longest = (direction[0].numel() * lists.divisor / lists._weighting_factor) ** 0.5
        norms = slot_norms(direction)
        # Reading a value on the CPU costs nothing.
        if not is_asynchronous(direction.device) and bool((norms <= longest).all()):
            continue
        scales = norms.reciprocal_().mul_(longest).clamp_(max=1.0)
        scales = torch.where(_are_undamped(lists, piece), scales, 1.0)
        direction.mul_(scales.to(direction.dtype).view(-1, *[1] * (direction.dim() - 1)))


def _are_undamped(lists: StackedPreconditionerList, piece: Piece) -> Tensor:
    """(K,) bool: for which blocks a damping is below the round-off of its factor matrix."""
    are_undamped: list[Tensor] = []
    for factor in piece.bucket.factors:
        stack, rows = lists._factors[factor.stack], piece.factor_rows(factor)
        traces = stack.diagonals(rows).sum(-1) / lists.divisor
        # A lower dtype's is above what damping its users give, and is meant by them.
        dtype = torch.promote_types(stack.data.dtype, torch.float32)
        round_off = traces * torch.finfo(dtype).eps
        are_undamped.append(lists.damping_of(factor.stack, rows) < round_off)
    return torch.stack(are_undamped).any(0)
