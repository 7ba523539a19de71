"""Which parameters the base works on together.

A *cohort* is a part of a parameter group whose parameters lie on one device and have the same step count:
one group of the base. Parameters without state (frozen ones) are in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.guards.parameters import names_of

PARAMS = "params"
PARAM_NAMES = "param_names"


@dataclass(frozen=True, eq=False)
class Cohort:
    """A group of the base.

    Attributes:
        group_index: Which of the user's groups it belongs to.
        group: The base's group: some of its parameters, and its options.
    """

    group_index: int
    group: dict[str, Any]

    @property
    def params(self) -> list[Tensor]:
        """Its parameters."""
        params: list[Tensor] = self.group[PARAMS]
        return params


def partition(groups: Sequence[Mapping[str, Any]], steps: Mapping[Tensor, int]) -> list[Cohort]:
    """Cuts the user's groups into cohorts.

    Args:
        groups: The user's groups.
        steps: The step count of every parameter that has state; the others are left out.

    Returns:
        The cohorts, in the order of the groups, and within one of their first parameters.
    """
    cohorts = []
    for index, group in enumerate(groups):
        names = group.get(PARAM_NAMES)
        if names and len(names) != len(group[PARAMS]):  # edited: nobody knows whose they are
            names = names_of(group, index)
        members: dict[tuple[torch.device, int], dict[Tensor, str | None]] = {}
        for position, param in enumerate(group[PARAMS]):
            if param in steps:
                part = members.setdefault((param.device, steps[param]), {})
                # A parameter that is given twice is trained once.
                part.setdefault(param, names[position] if names else None)
        for part in members.values():
            named = {PARAM_NAMES: list(part.values())} if names else {}
            cohorts.append(Cohort(index, {**options_of(group), PARAMS: list(part), **named}))
    return cohorts


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group without its parameters and their names."""
    return {key: value for key, value in group.items() if key not in (PARAMS, PARAM_NAMES)}
