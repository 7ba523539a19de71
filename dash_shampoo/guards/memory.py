"""Whether the parameters are still those that the blocks were cut from: compared before every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from dash_shampoo.guards.trees import local


class SeenParameters:
    """The memory of the parameters as it was when the blocks were cut.

    Args:
        groups: The user's parameter groups.
        params: The parameters that have state.

    Attributes:
        params: The same.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor]) -> None:
        self._members = tuple(tuple(group["params"]) for group in groups)
        self.params = tuple(params)
        self._shapes = tuple(p.shape for p in params)
        self._has_dtensors = any(local(p) is not p for p in params)
        self._fingerprints = self._take()

    def _take(self) -> tuple[list[int], list[Any]]:
        # Another dtype, device or layout is other memory, or other strides. About 0.1 µs each.
        params = [*map(local, self.params)] if self._has_dtensors else self.params
        return [*map(Tensor.data_ptr, params)], [*map(Tensor.stride, params)]

    def sharing(self) -> tuple[Tensor, Tensor] | None:
        """Two parameters that begin at the same place, or None."""
        found: dict[int, Tensor] = {}
        for param, address in zip(self.params, self._fingerprints[0], strict=True):
            # Empty ones, and those without memory, lie at 0.
            if (
                address
                and local(param).numel()
                and (other := found.setdefault(address, param)) is not param
            ):
                return other, param
        return None

    def have_other_groups(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether other parameters are in the groups, or in another order."""
        return len(groups) != len(self._members) or not all(
            len(group["params"]) == len(members) and all(map(is_, group["params"], members))
            for group, members in zip(groups, self._members, strict=True)
        )

    def have_moved(self) -> bool:
        """Whether a parameter lies in other memory than its blocks."""
        return self._take() != self._fingerprints

    def reshaped(self) -> Tensor | None:
        """A parameter that has another shape than its state, or None."""
        for param, shape in zip(self.params, self._shapes, strict=True):
            if param.shape != shape:
                return param
        return None
