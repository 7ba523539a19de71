"""Which polynomials serve a root, a relative damping and an accuracy: from the tables, or computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dash_shampoo.inverse_root.ladder import Ladder
from dash_shampoo.inverse_root.minimax_tables import TABLES, Table

# A table for a lower damping serves too; beyond this ratio a ladder is computed for the very interval.
_MAX_TABLE_RATIO = 3.5
_MAX_SQUARINGS = 15
# Below it a ladder and a quartic take fewer products than one ladder.
_MIN_LADDER_ACCURACY = 5e-5


@dataclass(frozen=True)
class Chain:
    """Polynomials that are applied one after the other.

    Attributes:
        root (Fraction): p.
        relative_epsilon (float): The damping relative to the bound of λ_max.
        margin (float): How far M may be above 1, relatively.
        ladders (tuple): T_1 … T_m. All but the last are scaled such that T_j^p M is at most
            1/(1 + margin).
        error (float): Largest relative error of an eigenvalue of the root.
    """

    root: Fraction
    relative_epsilon: float
    margin: float
    ladders: tuple[Ladder, ...]
    error: float

    @property
    def num_matmuls(self) -> int:
        """Products in all: the ladders', and those that apply one and contract M."""
        p = int(self.root)
        power = p // 2 if p % 2 == 0 else p
        products = power.bit_length() - 1 + power.bit_count() - 1 + (2 if p % 2 == 0 else 1)
        return (
            max(self.ladders[0].num_matmuls, 1)
            + sum(ladder.num_matmuls for ladder in self.ladders[1:])
            + (len(self.ladders) - 1) * (products + 1)
        )


def lower_end(relative_epsilon: float, margin: float) -> float:
    """The smallest eigenvalue that M = c(A + δI) can have.

    Args:
        relative_epsilon: ε.
        margin: m.

    Returns:
        ε/((1 + ε)(1 + m)).
    """
    return relative_epsilon / ((1.0 + relative_epsilon) * (1.0 + margin))


@lru_cache(maxsize=256)
def plan_chain(
    root: Fraction,
    relative_epsilon: float,
    margin: float,
    accuracy: float,
    degrees: tuple[int, ...] | None,
) -> Chain:
    """The chain with the fewest products for an accuracy, or the one with the given degrees.

    Args:
        root: p.
        relative_epsilon: Relative damping.
        margin: Relative margin above 1.
        accuracy: Largest relative error that is allowed, where no degrees are given.
        degrees: Degrees of the polynomials, powers of two.

    Returns:
        The chain: a single ladder, or a ladder and a quartic for the highest accuracies.

    Raises:
        ValueError: If a chain of several polynomials is needed and the root is not an integer.

    Note:
        Roots 2 and 4 with a relative damping between 1e-6 and 1e-3, and root 1 between 1e-4 and 1e-3,
        come from the tables where they reach the accuracy; others are computed in float64 within
        seconds, once per process.
    """
    lower = lower_end(relative_epsilon, margin)
    if degrees is not None:
        return _compose(root, relative_epsilon, margin, degrees)
    serving = [
        table
        for table in TABLES
        if table.root == root and table.lower <= lower * (1 + 1e-9) and table.error <= accuracy
    ]
    found = min(serving, key=lambda table: (table.ladder.num_matmuls, table.error), default=None)
    if found is not None and lower <= _MAX_TABLE_RATIO * found.lower:
        return Chain(root, relative_epsilon, margin, (found.ladder,), found.error)
    return _compute(root, relative_epsilon, margin, accuracy)


def _compute(root: Fraction, relative_epsilon: float, margin: float, accuracy: float) -> Chain:
    """A ladder for this very interval; a ladder and a quartic where one ladder does not do."""
    lower = lower_end(relative_epsilon, margin)
    can_compose = root.denominator == 1
    if accuracy >= _MIN_LADDER_ACCURACY or not can_compose:
        start = min(_guess(root, lower, accuracy), _MAX_SQUARINGS)
        for k in range(start, _MAX_SQUARINGS + 1):
            ladder, error = _design(k, root, lower)
            if error <= accuracy:
                return Chain(root, relative_epsilon, margin, (ladder,), error)
    if can_compose:
        for k in range(min(_guess(root, lower, 0.2), _MAX_SQUARINGS), _MAX_SQUARINGS + 1):
            chain = _compose(root, relative_epsilon, margin, (2**k, 4))
            if chain.error <= accuracy:
                return chain
    raise ValueError(f"{accuracy=} is out of reach for {root=} and {relative_epsilon=}.")


def _guess(root: Fraction, lower: float, accuracy: float) -> int:
    """About the fewest squarings that may reach an accuracy.

    Fitted to the tables: ten times the range takes two more, and each divides the error by 4 to 5.
    """
    error = 0.012 * (4.0 / float(root)) ** 1.6
    guess = 2.0 * math.log10(1.0 / lower) + math.log(error / accuracy) / 1.55
    return max(math.floor(guess), 2)


@lru_cache(maxsize=256)
def _design(num_matmuls: int, root: Fraction, lower: float) -> tuple[Ladder, float]:
    """The minimax ladder of k squares on [lower, 1], and its error."""
    # Imported where it is needed: most programs live on the tables.
    from dash_shampoo.inverse_root import minimax_generator as generator

    if num_matmuls <= 2:
        coefficients, error = generator.remez((1, 2, 4)[num_matmuls], float(root), lower)
        return generator.quartic_ladder(coefficients), error
    return generator.design(num_matmuls, float(root), lower, _near_tables(num_matmuls, root, lower))


def _near_tables(num_matmuls: int, root: Fraction, lower: float) -> tuple[Ladder, ...]:
    """Tables of the same number of squares that are good starts: the nearest roots and intervals."""

    def distance(table: Table) -> float:
        return abs(math.log(table.root / root)) + abs(math.log(table.lower / lower))

    same = [table for table in TABLES if table.ladder.num_matmuls == num_matmuls]
    return tuple(table.ladder for table in sorted(same, key=distance)[:3])


def _compose(
    root: Fraction, relative_epsilon: float, margin: float, degrees: tuple[int, ...]
) -> Chain:
    """The polynomials T_j of the given degrees, each the minimax on what the ones before leave.

    On [l_j, 1], T_j is x^(-1/p) within E_j. Divided by (1 + E_j)(1 + margin)^(1/p), it takes M to
    T_j^p M in [l_(j+1), 1/(1 + margin)], l_(j+1) = ((1 - E_j)/(1 + E_j))^p / (1 + margin).
    """
    if len(degrees) > 1 and root.denominator != 1:
        raise ValueError(f"A chain of several polynomials needs an integer root, not {root=}.")
    lower, ladders, error = lower_end(relative_epsilon, margin), [], 0.0
    for i, degree in enumerate(degrees):
        ladder, error = _design(degree.bit_length() - 1, root, lower)
        if i + 1 < len(degrees):
            ladder = ladder.scaled(1.0 / ((1.0 + error) * (1.0 + margin) ** (1.0 / float(root))))
            lower = ((1.0 - error) / (1.0 + error)) ** float(root) / (1.0 + margin)
        ladders.append(ladder)
    return Chain(root, relative_epsilon, margin, tuple(ladders), error)
