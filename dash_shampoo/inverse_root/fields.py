"""Checks of the fields of a config, with messages that name the field, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args


def check_field(owner: object, name: str, is_allowed: bool, allowed: str) -> None:
    """Refuse a field's value unless it is allowed.

    Args:
        owner: The config.
        name: The field.
        is_allowed: Whether its value is.
        allowed: What would be, in words.

    Raises:
        ValueError: If it is not.
    """
    if not is_allowed:
        raise ValueError(
            f"Invalid {name}={getattr(owner, name)!r} in {type(owner).__name__}: must be {allowed}."
        )


def is_int(value: object) -> bool:
    """Whether a value is an integer, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, and not True or False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_positive_int(owner: object, name: str, at_least: int = 1) -> None:
    """Refuse a field that is not an integer of at least a number."""
    value = getattr(owner, name)
    check_field(
        owner, name, is_int(value) and value >= at_least, f"an integer of at least {at_least}"
    )


def check_one_of(owner: object, name: str, choices: Iterable[object]) -> None:
    """Refuse a field that is none of some values."""
    allowed = tuple(choices)
    check_field(
        owner, name, getattr(owner, name) in allowed, f"one of {', '.join(map(str, allowed))}"
    )


def check_choice(owner: object, name: str, literal: object, *more: str) -> None:
    """Refuse a field that is none of the values of a Literal, `more` beside them."""
    check_one_of(owner, name, (*get_args(literal), *more))
