"""From nodes of the configuration to the optimizer and the data."""

import inspect
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from dash_shampoo.cli.data import TokenData
from dash_shampoo.cli.parallel import build
from dash_shampoo.cli.settings import SettingsError


def build_optimizer(
    config: DictConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    distributed_config: Any | None = None,
) -> Optimizer:
    """Make the optimizer that the group ``optimizer`` describes.

    Args:
        config: A ``_target_`` with the constructor's arguments beside it.
        parameters: Named parameters, so that an optimizer's messages can tell their names.
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
        optimizer = constructor(list(parameters), **arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SettingsError(f"optimizer: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise SettingsError(f"optimizer._target_={config._target_} is not an optimizer of torch.")
    return optimizer


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
