"""Checks of what the constructor and the parameter groups are given: the same words on both bases.

Every message names the argument, its value and what is allowed. A wrong type is a TypeError, a value out
of range a ValueError.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import (
    ROW_PARTS,
    ClassicMomentumConfig,
    ConcurrencyConfig,
    DistributedConfig,
    GeneralizedPrimalAveragingConfig,
    MatrixFunctionConfig,
    PreconditionerConfig,
    PseudoInverseConfig,
    ScheduleFreeConfig,
    ShampooPT2CompileConfig,
    ShampooRuntimeConfig,
    WeightDecayType,
)


@dataclass(frozen=True)
class _Rule:
    """What a value must be.

    Attributes:
        types: Allowed types.
        allowed: The same in words.
        in_range: Whether a value of these types is allowed.
    """

    types: tuple[type, ...]
    allowed: str
    in_range: Callable[[Any], bool] = lambda _: True

    def has_type(self, value: object) -> bool:
        """Whether a value is of an allowed type; torch takes no Fraction."""
        is_fraction = isinstance(value, Rational) and not isinstance(value, Integral)
        is_bool = isinstance(value, bool) and bool not in self.types
        return isinstance(value, self.types) and not is_bool and not is_fraction

    def check(self, name: str, value: object) -> None:
        if not self.has_type(value):
            raise TypeError(
                f"Invalid {name}={_shown(value)}: must be {self.allowed}.{_hint(value)}"
            )
        if not self.in_range(value):
            raise ValueError(f"Invalid {name}={_shown(value)}: must be {self.allowed}.")


_LARGEST = torch.finfo(torch.float32).max


def _is_at_least_0(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.dim() or value.is_meta or value.is_complex() or value.dtype == torch.bool:
            return False
        value = value.item()
    return bool(0.0 <= value <= _LARGEST)


_BOOL = _Rule((bool,), "True or False")
_AT_LEAST_0 = _Rule((Real,), "a finite number (in float32) of at least 0", _is_at_least_0)
_AVERAGING = (ClassicMomentumConfig, GeneralizedPrimalAveragingConfig, ScheduleFreeConfig)
_BETA1 = _Rule((Real,), "a number in [0, 1)", lambda v: 0.0 <= v < 1.0)
_BETA2 = _Rule((Real,), "a number in [0, 1]", lambda v: 0.0 <= v <= 1.0)

# Options of a parameter group, by name.
_RULES: dict[str, _Rule] = {
    "lr": _Rule(
        (Real, Tensor),
        "a finite number (in float32) of at least 0, or a tensor of one such without dimensions",
        _is_at_least_0,
    ),
    "beta3": _Rule(
        (Real,), "a number in [0, 1), or -1 for beta1", lambda v: v == -1 or 0.0 <= v < 1.0
    ),
    "epsilon": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "peak_lr": _AT_LEAST_0,
    "weight_decay_type": _Rule(
        (WeightDecayType,),
        "one of " + ", ".join(f"WeightDecayType.{t.name}" for t in WeightDecayType),
    ),
    "max_preconditioner_dim": _Rule(
        (Integral, float),
        "an integer of at least 1, or math.inf",
        lambda v: v == math.inf or (isinstance(v, Integral) and int(v) >= 1),
    ),
    "precondition_frequency": _Rule((Integral,), "an integer of at least 1", lambda v: v >= 1),
    "start_preconditioning_step": _Rule(
        (Integral, float),
        "an integer of at least precondition_frequency, math.inf, or -1 for precondition_frequency",
        lambda v: v == math.inf or (isinstance(v, Integral) and int(v) >= -1),
    ),
    "use_bias_correction": _BOOL,
    "iterate_averaging_config": _Rule(
        (*_AVERAGING, type(None)),
        "one of " + ", ".join(c.__name__ for c in _AVERAGING) + ", or None",
    ),
    "grafting_config": _Rule((PreconditionerConfig, type(None)), "a PreconditionerConfig, or None"),
    "use_pin_memory": _BOOL,
    "distributed_config": _Rule((DistributedConfig,), "a DistributedConfig"),
    "preconditioner_config": _Rule((PreconditionerConfig,), "a PreconditionerConfig"),
}
# Arguments of the constructor that are no options of a group.
_ARGUMENT_RULES: dict[str, _Rule] = {
    "shampoo_pt2_compile_config": _Rule(
        (ShampooPT2CompileConfig, type(None)), "a ShampooPT2CompileConfig, or None"
    ),
    "shampoo_runtime_config": _Rule((ShampooRuntimeConfig,), "a ShampooRuntimeConfig"),
    "concurrency_config": _Rule((ConcurrencyConfig,), "a ConcurrencyConfig"),
}

OPTIONS = ("betas", *_RULES)
"""The names of a group's options."""


def check_options(options: Mapping[str, Any], where: str = "", is_edit: bool = False) -> None:
    """Checks the options of a parameter group, or all of the constructor's arguments but `params`.

    Args:
        options: The group, or the arguments; unknown keys are the user's own.
        where: Put behind the name in messages, such as " of parameter group 1". (Default: "")
        is_edit: Whether the preconditioner may have started already. (Default: False)

    Raises:
        TypeError: If one has a wrong type.
        ValueError: If one is out of range, or two contradict each other.
    """
    for name, rule in {**_ARGUMENT_RULES, **_RULES}.items():
        if name in options:
            rule.check(f"{name}{where}", options[name])
            if is_dataclass(options[name]) and name in _RULES:
                _check_fields(f"{name}{where}", options[name])
    if "betas" in options:
        _check_betas(options["betas"], where)
    _check_epsilon(options, where)
    if (row_parts := options.get(ROW_PARTS)) is not None:
        _check_row_parts(row_parts, where)
    decay_type = options.get("weight_decay_type")
    if decay_type in (WeightDecayType.CORRECTED, WeightDecayType.INDEPENDENT):
        peak = options.get("peak_lr", options.get("lr"))
        if not float(peak if peak is not None else 1.0) > 0.0:
            raise ValueError(
                f"Invalid peak_lr{where}={peak!r}: must be above 0 with "
                f"weight_decay_type={decay_type}; it is the group's lr unless given."
            )
    start, frequency = (
        options.get(name) for name in ("start_preconditioning_step", "precondition_frequency")
    )
    if is_edit or start is None or frequency is None or start == -1:
        return
    if start < frequency:
        raise ValueError(
            f"Invalid start_preconditioning_step{where}={start}: must be at least "
            f"precondition_frequency={frequency}, or -1 for the same."
        )


def check_complete(group: Mapping[str, Any], index: int) -> None:
    """Refuses a parameter group from which options were removed, or that was never completed.

    Raises:
        ValueError: Naming the first that is missing.
    """
    if missing := [name for name in ("params", *OPTIONS) if name not in group]:
        raise ValueError(
            f"Parameter group {index} has no {missing[0]!r}: edit the options in the group, or add groups "
            "by add_param_group(), which completes them."
        )


def check_lr(lr: object, where: str) -> None:
    """Checks a learning rate before a step; a tensor is not read, which would wait for its device.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if not isinstance(lr, Tensor):
        _RULES["lr"].check(f"lr{where}", lr)


def is_lr(value: object) -> bool:
    """Whether a value is a learning rate."""
    rule = _RULES["lr"]
    return rule.has_type(value) and rule.in_range(value)


def misspelled(names: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names that nobody knows, each with the known one that was probably meant."""
    for name in names:
        if name not in known and (close := get_close_matches(name, known, n=1, cutoff=0.8)):
            yield name, close[0]


def _check_betas(betas: object, where: str) -> None:
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise TypeError(
            f"Invalid betas{where}={_shown(betas)}: must be two numbers (beta1, beta2)."
        )
    _BETA1.check(f"betas[0]{where}", betas[0])
    _BETA2.check(f"betas[1]{where}", betas[1])


def _check_row_parts(row_parts: object, where: str) -> None:
    parts: Sequence[object] = [row_parts]
    if isinstance(row_parts, Sequence) and not isinstance(row_parts, str):
        parts = row_parts
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in parts):
        raise TypeError(
            f"Invalid {ROW_PARTS}{where}={_shown(row_parts)}: must be how many equal parts there are, a "
            "tuple of how many rows each has, or None."
        )


def _check_epsilon(options: Mapping[str, Any], where: str) -> None:
    if "epsilon" not in options or "preconditioner_config" not in options:
        return
    epsilon = options["epsilon"]
    solver = getattr(options["preconditioner_config"], "amortized_computation_config", None)
    stability = getattr(solver, "rank_deficient_stability_config", None)
    if isinstance(stability, PseudoInverseConfig):
        is_allowed, allowed = epsilon == 0.0, "0.0 when PseudoInverseConfig is used"
    else:
        is_allowed, allowed = epsilon > 0.0, "above 0"
    if not is_allowed:
        raise ValueError(f"Invalid epsilon{where}={epsilon!r}: must be {allowed}.")


def _check_fields(path: str, config: Any) -> None:
    """Types of a config's fields, and that its numbers are finite; ranges are the class's own matter."""
    try:
        hints = typing.get_type_hints(type(config))
    except (NameError, TypeError):  # annotations of a future release that this Python can't resolve
        return
    for field in fields(config):
        value = getattr(config, field.name, None)
        name = f"{path}.{field.name}"
        allowed = _scalar_types(hints.get(field.name))
        if allowed and not _conforms(value, allowed):
            words = " or ".join(sorted(t.__name__ for t in allowed))
            raise TypeError(f"Invalid {name}={_shown(value)}: must be {words}.")
        # "int | float" means an integer or infinity.
        is_open = int in allowed and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not is_open:
            raise ValueError(f"Invalid {name}={value!r}: must be finite.")
        if is_dataclass(value) and not isinstance(value, type):
            _check_fields(name, value)


def _scalar_types(hint: Any) -> tuple[type, ...]:
    """The scalar types of an annotation, or none where it says more than that."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    scalars = (bool, int, float, str, type(None))
    return tuple(options) if options and all(option in scalars for option in options) else ()


_WIDER: dict[type, type] = {int: Integral, float: Real}


def _conforms(value: object, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    if int in allowed and isinstance(value, float) and value.is_integer():
        return True
    return isinstance(value, tuple(_WIDER.get(kind, kind) for kind in allowed))


def _shown(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _hint(value: object) -> str:
    """What to write instead, for the usual slips."""
    if isinstance(value, MatrixFunctionConfig):
        name = type(value).__name__
        return (
            f" {name} is a solver: wrap it, as in preconditioner_config="
            f"RootInvShampooPreconditionerConfig(amortized_computation_config={name}(...))."
        )
    if isinstance(value, type) and (is_dataclass(value) or issubclass(value, enum.Enum)):
        return f" {value.__name__} is a class: give an instance, {value.__name__}(...)."
    return ""
