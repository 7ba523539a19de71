"""The options of the stacked computation, for configs that have them and for those that do not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dash_shampoo.config import StackedConfig

_DEFAULTS = {field.name: (field.default,) for field in fields(StackedConfig)}


class StackedOptions:
    """A preconditioner config with the options of the stacked computation.

    All attributes of the config can be read; those of `StackedConfig` have its defaults where the config
    has none.

    Args:
        config: A config of the base or of ours.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is copied
            raise AttributeError(name)
        return getattr(self._config, name, *_DEFAULTS.get(name, ()))
