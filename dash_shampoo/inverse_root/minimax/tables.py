"""The ladders that were found by `tools/minimax`, and which of them serves.

A table holds for one root p, relative damping ε and number of squarings k the ladder that was found to have
the least largest error |x^(1/p) f(x) - 1| on [ε/((1 + ε)(1 + margin)), 1]. One file for each root, read when
it is first asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files

from dash_shampoo.inverse_root.minimax.ladder import Ladder

ROOTS = tuple(Fraction(root) for root in ("1", "2", "8/3", "3", "4", "6", "8", "10"))
_OTHERS = "EigenConfig and ChebyshevConfig take any root"


@dataclass(frozen=True)
class Table:
    """A ladder and what it is good for.

    Attributes:
        root (Fraction): p.
        relative_epsilon (float): ε.
        lower (float): Lower end of the interval.
        error (float): Largest relative error on it.
        ladder (Ladder): f.
    """

    root: Fraction
    relative_epsilon: float
    lower: float
    error: float
    ladder: Ladder

    @property
    def num_squarings(self) -> int:
        """The products that it takes."""
        return self.ladder.num_squarings


def lower_end(relative_epsilon: float, margin: float) -> float:
    """The smallest eigenvalue of M = c(A + δI), δ = ε·λ̂, c = 1/((λ̂ + δ)(1 + margin)).

    Args:
        relative_epsilon: ε.
        margin: How far M may be above 1, relatively.

    Returns:
        ε/((1 + ε)(1 + margin)).
    """
    return relative_epsilon / ((1.0 + relative_epsilon) * (1.0 + margin))


@lru_cache(maxsize=16)
def tables_of(root: Fraction) -> tuple[Table, ...]:
    """All tables of a root.

    Args:
        root: p.

    Returns:
        The tables, in the order of falling damping and rising number of squarings.

    Raises:
        ValueError: If there is none; names the nearest roots.
    """
    if root not in ROOTS:
        below = [str(other) for other in ROOTS if other < root][-1:]
        above = [str(other) for other in ROOTS if other > root][:1]
        nearest = " and ".join(below + above)
        raise ValueError(
            f"root={root} has no table of MinimaxConfig; the nearest are {nearest} ({_OTHERS})."
        )
    name = f"root_{root.numerator}_{root.denominator}.json"
    data = json.loads(files(__package__).joinpath("tables", name).read_text(encoding="utf-8"))
    return tuple(
        Table(
            root,
            epsilon,
            lower_end(epsilon, data["margin"]),
            error,
            Ladder(tuple((a, b, c) for a, b, c in rungs), tuple(output)),
        )
        for epsilon, error, rungs, output in data["tables"]
    )


@lru_cache(maxsize=256)
def find_table(
    root: Fraction,
    relative_epsilon: float,
    margin: float,
    accuracy: float,
    num_squarings: int | None,
) -> Table:
    """The table with the fewest products for an accuracy, or the best one with a given number of them.

    Args:
        root: p.
        relative_epsilon: Relative damping; tables for a smaller one serve too.
        margin: Relative margin above 1.
        accuracy: Largest error that is allowed, where no number is given.
        num_squarings: k, or None.

    Returns:
        The table.

    Raises:
        ValueError: If no table serves; says which is the nearest.
    """
    lower = lower_end(relative_epsilon, margin)
    serving = [table for table in tables_of(root) if table.lower <= lower * (1 + 1e-9)]
    if not serving:
        least = min(table.relative_epsilon for table in tables_of(root))
        raise ValueError(
            f"{relative_epsilon=} with {margin=} has no table of MinimaxConfig; the smallest is {least:g} "
            "with margin=0.02."
        )
    if num_squarings is not None:
        exact = [table for table in serving if table.num_squarings == num_squarings]
        if exact:
            return min(exact, key=lambda table: table.error)
        numbers = {table.num_squarings for table in serving}
        nearest = min(numbers, key=lambda number: (abs(number - num_squarings), number))
        raise ValueError(
            f"{num_squarings=} has no table of MinimaxConfig for root={root} and {relative_epsilon=}; the "
            f"nearest is {nearest}."
        )
    accurate = [table for table in serving if table.error <= accuracy]
    if not accurate:
        best = min(serving, key=lambda table: table.error)
        raise ValueError(
            f"{accuracy=} is out of reach of MinimaxConfig for root={root} and {relative_epsilon=}; the "
            f"nearest is {best.error:.2g}, by {best.num_squarings} squarings."
        )
    return min(accurate, key=lambda table: (table.num_squarings, table.error))
