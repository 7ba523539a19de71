"""Tensors that Meta's package can work on, lent to it for those that it can't.

It takes views of parameters and gradients, which a memory format such as channels last does not allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dash_shampoo.base import name as base_name
from dash_shampoo.guards.cohorts import PARAMS, Cohort


def needs_stand_in(param: Tensor) -> bool:
    """Whether the base can't take views of a parameter; the embedded base copes by itself."""
    return base_name == "meta" and not hasattr(param, "to_local") and not param.is_contiguous()


class Lender:
    """The stand-ins of some parameters.

    Args:
        params: Parameters that need one.

    Attributes:
        stand_ins: By parameter a contiguous copy.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.stand_ins: dict[Tensor, Tensor] = {
            param: torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
            for param in params
        }

    @contextmanager
    def lent(self, cohorts: Sequence[Cohort]) -> Iterator[None]:
        """Gives the base the values and gradients of now, and the parameters what has become of them.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        if base_name != "meta":
            yield
            return
        for param, stand_in in self.stand_ins.items():
            stand_in.copy_(param)
            stand_in.grad = param.grad
        borrowed = list(self._make_contiguous(cohorts))
        try:
            yield
        finally:
            for param, stand_in in self.stand_ins.items():
                param.copy_(stand_in)
                stand_in.grad = None
            for tensor, grad in borrowed:
                tensor.grad = grad

    def _make_contiguous(self, cohorts: Sequence[Cohort]) -> Iterator[tuple[Tensor, Tensor]]:
        """Replaces gradients that the base can't view; yields each with the one that it had."""
        for cohort in cohorts:
            for tensor in cohort.group[PARAMS]:
                grad = tensor.grad
                if grad is None or hasattr(grad, "to_local"):
                    continue
                if grad.is_sparse:
                    raise RuntimeError(
                        f"A parameter of shape {tuple(tensor.shape)} has a sparse gradient: Shampoo needs "
                        "dense ones. Use sparse=False in its embedding."
                    )
                if not grad.is_contiguous():
                    tensor.grad = None
                    tensor.grad = grad.contiguous()
                    yield tensor, grad
