"""Directions with the norms of another method's, by slots of buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import GRAFTING_PRECONDITIONER_LIST, SHAMPOO_PRECONDITIONER_LIST
from dash_shampoo.preconditioners.limits import limit_
from dash_shampoo.preconditioners.modes import parts
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList
from dash_shampoo.safety import slot_norms

# Where the base's elementwise lists have the second moments of the active blocks; given anew in every step.
_MOMENTS = "_masked_preconditioner_list"
# What the base adds to a norm before it divides by it.
_SMALLEST_NORM = 1e-16
_LARGEST_FP16 = torch.finfo(torch.float16).max
_SMALLEST_FP16 = 2.0**-24  # above 0


def precondition_and_graft(
    lists: Mapping[str, Any],
    filtered_grads: Sequence[Tensor],
    is_warm_up: bool,
    use_grafting: bool,
    has_started: bool,
) -> tuple[Tensor, ...]:
    """P = P_shampoo · ‖P_grafting‖ / ‖P_shampoo‖ by slot; P_grafting before the first roots.

    Args:
        lists: Lists on buckets.
        filtered_grads: (K, *shape) of each piece; not modified.
        is_warm_up: Whether the grafting's direction is taken as it is.
        use_grafting: Whether there is a grafting.
        has_started: Whether there may be roots, so that directions without a grafting have a limit.

    Returns:
        Directions of the pieces, in new memory.
    """
    if is_warm_up:
        grafted = _precondition(lists[GRAFTING_PRECONDITIONER_LIST], filtered_grads)
        return _in_dtypes_of(filtered_grads, grafted)
    shampoo = lists[SHAMPOO_PRECONDITIONER_LIST]
    directions = _precondition(shampoo, filtered_grads)
    if use_grafting:
        scales = _norms_of_directions(lists[GRAFTING_PRECONDITIONER_LIST], filtered_grads)
        norms = [*map(slot_norms, directions)]
        torch._foreach_add_(norms, _SMALLEST_NORM)
        torch._foreach_div_(scales, norms)
        for direction, scale in zip(directions, scales, strict=True):
            direction.mul_(scale.to(direction.dtype).view(-1, *[1] * (direction.dim() - 1)))
    elif has_started and isinstance(shampoo, StackedPreconditionerList):
        limit_(shampoo, directions)
    return _in_dtypes_of(filtered_grads, directions)


def _norms_of_directions(lists: Any, grads: Sequence[Tensor]) -> list[Tensor]:
    """(K,) norms of a list's directions, which on the CPU never leave a core's cache."""
    cuts = [parts(grad) for grad in grads]
    if all(len(cut) == 1 for cut in cuts):
        return [*map(slot_norms, _precondition(lists, grads))]
    moments: Sequence[Tensor] | None = getattr(lists, _MOMENTS, None)
    norms = []
    for number, (grad, cut) in enumerate(zip(grads, cuts, strict=True)):
        norms_of_parts = []
        for part in cut:
            if moments is not None:
                setattr(lists, _MOMENTS, (moments[number][part],))
            norms_of_parts.append(slot_norms(_precondition(lists, (grad[part],))[0]))
        norms.append(torch.cat(norms_of_parts))
    return norms


def _in_dtypes_of(grads: Sequence[Tensor], directions: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Directions in the gradients' dtypes; finite, where they were computed in a wider one."""
    return tuple(
        direction
        if direction.dtype == grad.dtype
        else direction.clamp(-_LARGEST_FP16, _LARGEST_FP16).to(grad.dtype)
        for direction, grad in zip(directions, grads, strict=True)
    )


def _precondition(lists: Any, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The directions of a list, in new memory; in fp32 where gradients are in fp16.

    There, second moments below 6e-8 are 0 and those above 65504 infinite, and so would be the quotients;
    and a direction has its final size after grafting only.
    """
    if any(grad.dtype == torch.float16 for grad in grads):
        if hasattr(lists, _MOMENTS):
            setattr(lists, _MOMENTS, tuple(map(_in_range, getattr(lists, _MOMENTS))))
        grads = tuple(g.float() if g.dtype == torch.float16 else g for g in grads)
    directions = lists.precondition(masked_grad_list=grads)
    # The identity (SGD) gives the very gradients back, which may be the state.
    return tuple(
        direction.clone() if direction is grad else direction
        for direction, grad in zip(directions, grads, strict=True)
    )


def _in_range(moment: Tensor) -> Tensor:
    """A second moment; one in fp16 as the nearest in fp32 that has a quotient, infinity taken back."""
    if moment.dtype != torch.float16:
        return moment
    return moment.clamp_(max=_LARGEST_FP16).float().clamp_(min=_SMALLEST_FP16)
