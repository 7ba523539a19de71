"""The options of the stacked computation, for configs that have them and for those that do not."""

from __future__ import annotations

from typing import Any

from dash_shampoo.config import DashShampooPreconditionerConfig, SafetyConfig


class StackedOptions:
    """A preconditioner config with the options of the stacked computation.

    All attributes of the config can be read; `max_workspace_bytes` and `safety` are those of
    `DashShampooPreconditionerConfig` where the config has none.

    Args:
        config: A config of the base or of ours.
    """

    max_workspace_bytes: int
    safety: SafetyConfig | None

    def __init__(self, config: Any) -> None:
        self._config = config
        default = DashShampooPreconditionerConfig
        self.max_workspace_bytes = getattr(
            config, "max_workspace_bytes", default.max_workspace_bytes
        )
        self.safety = getattr(config, "safety", default.safety)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)
