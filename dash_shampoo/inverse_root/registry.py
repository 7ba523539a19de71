"""The table of solvers: a line for each config class."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeVar

from dash_shampoo.base import (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    RootInvConfig,
)
from dash_shampoo.inverse_root import (
    chebyshev,
    coupled_higher_order,
    coupled_newton,
    eigen,
    newton_db,
    newton_schulz,
)
from dash_shampoo.inverse_root.minimax import solve as minimax
from dash_shampoo.inverse_root.solver import Solver

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

SOLVERS: dict[type[RootInvConfig], Solver] = {
    EigenConfig: eigen.SOLVER,
    CoupledNewtonConfig: coupled_newton.SOLVER,
    coupled_newton.ScaledCoupledNewtonConfig: coupled_newton.SOLVER,
    CoupledHigherOrderConfig: coupled_higher_order.SOLVER,
    newton_db.NewtonDBConfig: newton_db.SOLVER,
    newton_schulz.NewtonSchulzRootInvConfig: newton_schulz.SOLVER,
    chebyshev.ChebyshevConfig: chebyshev.SOLVER,
    minimax.MinimaxConfig: minimax.SOLVER,
}


def as_root(root: int | float | Fraction) -> Fraction:
    """Turn a root into a fraction; a float within round-off of a small fraction becomes it.

    Args:
        root: p of A^(-1/p), positive and finite.

    Returns:
        The root.

    Raises:
        ValueError: If `root` is not a positive finite number.

    Examples:
        >>> as_root(4), as_root(1 / 0.3), as_root(8 / 3)
        (Fraction(4, 1), Fraction(10, 3), Fraction(8, 3))
    """
    if isinstance(root, bool) or not isinstance(root, (int, float, Fraction)):
        raise ValueError(f"{root=} must be a positive number.")
    if not 0 < root < float("inf"):
        raise ValueError(f"{root=} must be positive and finite.")
    exact = Fraction(root)
    simple = exact.limit_denominator(1000)
    return simple if abs(simple - exact) <= exact * Fraction(1, 10**14) else exact


def of_class(
    table: Mapping[type[Any], _T], config: object, what: str, entries: str = "methods"
) -> _T:
    """Find what a table has for the class of a config, or else for its nearest base class.

    A class of the same name as one of the table, such as that of another version of the base's package,
    has the same entry.

    Args:
        table: Entries by class.
        config: A config.
        what: What is missing where there is no entry, for the message.
        entries: What the table has, in the plural.

    Returns:
        The entry.

    Raises:
        ValueError: If there is none.
    """
    by_name = {cls.__name__: entry for cls, entry in table.items()}
    for cls in type(config).__mro__:
        if cls.__name__ in by_name:
            return table.get(cls, by_name[cls.__name__])
    raise ValueError(
        f"No {what} takes {type(config).__name__}; there are {entries} for {', '.join(by_name)}."
    )


def find_solver(config: object) -> Solver:
    """Find the solver of a config, as of `of_class`.

    Args:
        config: A solver config.

    Returns:
        The solver.

    Raises:
        ValueError: If no solver takes it.
    """
    return of_class(SOLVERS, config, "inverse-root solver", "solvers")


def check_supported(config: RootInvConfig, root: int | float | Fraction | None = None) -> None:
    """Refuse a config that no solver takes, or a root that its solver can't do.

    Args:
        config: A solver config.
        root: p of A^(-1/p); None checks the config alone.

    Raises:
        ValueError: If there is no solver for the config, or the solver can't do the root.

    Examples:
        >>> from dash_shampoo import NewtonDBConfig
        >>> check_supported(NewtonDBConfig(), 4)
        >>> check_supported(NewtonDBConfig(), 3)
        Traceback (most recent call last):
        ValueError: root=3 is not one of 2, 4, 8, ...
    """
    solver = find_solver(config)
    if root is not None:
        solver.check(config, as_root(root))


def waits_for_device(config: RootInvConfig) -> bool:
    """Whether the host waits for an accelerator while a solver works there.

    Args:
        config: A solver config.

    Returns:
        False where the number of steps is fixed, so that a CUDA graph can hold them.

    Examples:
        >>> from dash_shampoo import MinimaxConfig
        >>> waits_for_device(MinimaxConfig()), waits_for_device(EigenConfig())
        (False, True)
    """
    return find_solver(config).waits(config)


def config_for_root(
    config: RootInvConfig, root: int | float | Fraction, second: RootInvConfig | None = None
) -> RootInvConfig:
    """The config itself, or a second one for a root that its solver can't do, which is logged once.

    Args:
        config: A solver config.
        root: p of A^(-1/p).
        second: The second solver. Default: `MinimaxConfig()`.

    Returns:
        The first of the two that does the root.

    Raises:
        ValueError: If there is no solver for `config`, or neither does the root.

    Examples:
        >>> from dash_shampoo import NewtonDBConfig
        >>> config_for_root(NewtonDBConfig(), 4)
        NewtonDBConfig(...)
        >>> config_for_root(NewtonDBConfig(), 6)
        MinimaxConfig(...)
    """
    solver, fraction = find_solver(config), as_root(root)
    try:
        solver.check(config, fraction)
        return config
    except ValueError as error:
        second = minimax.MinimaxConfig() if second is None else second
        try:
            check_supported(second, fraction)
        except ValueError as second_error:
            raise ValueError(f"{error} The second solver: {second_error}") from error
        _log_second(str(error), type(second).__name__)
        return second


@lru_cache(maxsize=64)
def _log_second(error: str, second: str) -> None:
    logger.warning("%s These roots are computed by %s instead. This is logged once.", error, second)
