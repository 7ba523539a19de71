"""Test grids that cover every pair of settings without the full product."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Cases in which every pair of values of any two options occurs at least once.

    Greedy: each case starts from an uncovered pair and takes, option by option, the value that covers
    most further pairs. The result depends on nothing but the arguments.
    """
    names = list(options)
    indices = {name: range(len(options[name])) for name in names}
    uncovered = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in indices[a]
        for j in indices[b]
    }
    rng = random.Random(seed)
    cases = []
    while uncovered:
        case = dict(min(uncovered))
        for name in rng.sample(names, len(names)):
            if name not in case:
                case[name] = max(indices[name], key=lambda i: (_gain(case, name, i, uncovered), -i))
        uncovered -= {tuple(pair) for pair in itertools.combinations(_ordered(case, names), 2)}
        cases.append({name: options[name][case[name]] for name in names})
    return cases


def _ordered(case, names):
    return [(name, case[name]) for name in names if name in case]


def _gain(case, name, index, uncovered):
    return sum(
        ((other, i), (name, index)) in uncovered or ((name, index), (other, i)) in uncovered
        for other, i in case.items()
    )
