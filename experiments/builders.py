"""From nodes of the configuration to the optimizer and the data."""

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from experiments.schedule import LearningRate
from experiments.settings import SettingsError
from experiments.tokens import TokenData


def build(config: DictConfig, key: str, **arguments: Any) -> Any:
    """Call what ``_target_`` names with the values beside it.

    Args:
        config: A node of the configuration with a ``_target_``.
        key: Its name, for messages.
        **arguments: Further arguments.

    Returns:
        What the call returned.

    Raises:
        SettingsError: If there is no such target or it refuses its arguments.
    """
    _check_flags(config, key)
    try:
        return instantiate(config, _convert_="all", **arguments)
    except MissingMandatoryValue as error:
        raise SettingsError(f"{error.full_key} must be given: {error.full_key}=...") from error
    except (InstantiationException, OmegaConfBaseException, TypeError) as error:
        cause = error.__cause__ or error
        # The full_key that a message ends with is what we say first.
        message = str(cause).partition("\nfull_key: ")[0]
        raise SettingsError(f"{key}: {message}") from error


def _check_flags(config: DictConfig, key: str) -> None:
    """Refuses a word where true or false is meant, in a node and those in it: any word would be true."""
    flags: set[str] = set()
    if "_target_" in config:
        with suppress(ImportError, ValueError, TypeError, InstantiationException):
            parameters = inspect.signature(get_method(config._target_)).parameters
            flags = {n for n, p in parameters.items() if p.annotation in (bool, "bool")}
    for name in map(str, config):
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        value = config[name]
        if name in flags and isinstance(value, str):
            raise SettingsError(f"{key}.{name}={value} must be true or false.")
        if isinstance(value, DictConfig):
            _check_flags(value, f"{key}.{name}")


def build_model(config: DictConfig, vocab_size: int, sequence_length: int) -> nn.Module:
    """Make the model that the group ``model`` describes.

    Args:
        config: A ``_target_`` with the constructor's arguments beside it.
        vocab_size: Passed on if the constructor has a parameter of this name.
        sequence_length: Passed on as ``max_sequence_length``, likewise.

    Returns:
        The model, on the default device.

    Raises:
        SettingsError: If there is no such target, it refuses its arguments or is no module.
    """
    given = {"vocab_size": vocab_size, "max_sequence_length": sequence_length}
    try:
        accepted = inspect.signature(get_method(config._target_)).parameters
    except (ImportError, ValueError, TypeError) as error:
        raise SettingsError(f"model._target_={config._target_} can't be found: {error}") from error
    takes_all = any(p.kind == p.VAR_KEYWORD for p in accepted.values())
    given = {k: v for k, v in given.items() if takes_all or k in accepted}
    model = build(config, "model", **{k: v for k, v in given.items() if config.get(k) is None})
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model._target_={config._target_} is not a torch.nn.Module.")
    return model


def build_optimizer(
    config: DictConfig,
    groups: Sequence[dict[str, Any]],
    distributed_config: Any | None = None,
) -> Optimizer:
    """Make the optimizer that the group ``optimizer`` describes.

    Args:
        config: A ``_target_`` with the constructor's arguments beside it.
        groups: Parameter groups, as of `parameter_groups`.
        distributed_config: Passed on if the constructor has a parameter of this name.

    Returns:
        The optimizer.

    Raises:
        SettingsError: If the target does not exist or refuses its arguments.
    """
    constructor = build(config, "optimizer", _partial_=True)
    arguments: dict[str, Any] = {}
    accepted = inspect.signature(constructor.func).parameters
    if distributed_config is not None and "distributed_config" in accepted:
        arguments["distributed_config"] = distributed_config
    try:
        optimizer = constructor(list(groups), **arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SettingsError(f"optimizer: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise SettingsError(f"optimizer._target_={config._target_} is not an optimizer of torch.")
    return optimizer


def build_learning_rate(config: DictConfig, optimizer: Optimizer, total_steps: int) -> LearningRate:
    """Make what sets the learning rates, and set those of the first step.

    Args:
        config: The group ``schedule``.
        optimizer: Whose.
        total_steps: Length of the run.

    Returns:
        The learning rates of the run.

    Raises:
        SettingsError: If the schedule can't be computed.
    """
    learning_rate = LearningRate(optimizer, total_steps, build(config, "schedule"))
    try:
        learning_rate.apply(0)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return learning_rate


def parameter_groups(model: nn.Module, config: DictConfig) -> list[dict[str, Any]]:
    """Split a model's parameters into groups by rules on their names.

    Args:
        model: Its parameters keep their names, so that an optimizer's messages can tell them.
        config: The group ``parameter_groups``: ``rules`` maps names to ``match``, a regular
            expression, and ``options`` of the group; ``by_parameter`` makes a group of each instead.

    Returns:
        One dict per rule with ``params`` and its options, after one of the parameters that no
        rule takes, unless there are none.

    Raises:
        SettingsError: If a rule takes no parameter, or two rules take the same.
    """
    rest = dict(model.named_parameters())
    if config.get("by_parameter"):
        return [{"params": [pair]} for pair in rest.items()]
    rules: Any = config.rules
    if not isinstance(rules, Mapping):
        raise SettingsError(
            f"parameter_groups.rules={rules!r} must map names to {{match: ..., options: ...}}."
        )
    groups = []
    for name, rule in rules.items():
        key = f"parameter_groups.rules.{name}"
        matched = [n for n, _ in model.named_parameters() if re.search(rule.match, n)]
        if not matched:
            raise SettingsError(f"{key}.match={rule.match} matches no parameter's name.")
        if doubly := [n for n in matched if n not in rest]:
            raise SettingsError(f"{key} takes {doubly[0]}, which an earlier rule took.")
        options = {
            option: build(value, f"{key}.options.{option}") if _has_target(value) else value
            for option, value in rule.options.items()
        }
        groups.append({"params": [(n, rest.pop(n)) for n in matched], **options})
    return [*([{"params": list(rest.items())}] if rest else []), *groups]


def _has_target(value: object) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def optimizer_family(optimizer: Optimizer) -> str:
    """The method whose state an optimizer keeps: what may continue from a checkpoint.

    Args:
        optimizer: Any optimizer of torch.

    Returns:
        Name of the class next below torch's `Optimizer`: "DistributedShampoo" for `DashShampoo`
        too, since their states interchange.
    """
    classes = [c for c in type(optimizer).__mro__ if issubclass(c, Optimizer)]
    return classes[-2].__name__


def build_data(config: DictConfig) -> TokenData:
    """Load the tokens that the group ``data`` describes.

    Args:
        config: The composed configuration.

    Returns:
        The data.

    Raises:
        SettingsError: If it can't be loaded.
    """
    data = build(config.data, "data")
    if not isinstance(data, TokenData):
        raise SettingsError(f"data._target_={config.data._target_} does not return TokenData.")
    return data
