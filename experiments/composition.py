"""What is asked of a composed configuration, and how an error of composing reads."""

import difflib
import re
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf


def choice(group: str) -> str:
    """Which file a group was read from, in the command that is running."""
    return str(HydraConfig.get().runtime.choices[group])


def optimizer_name(config: DictConfig) -> str:
    """The optimizer, and the solver if it has one, in words.

    Args:
        config: The composed settings of the command that is running.

    Returns:
        Such as "dash with newton_db".
    """
    name = choice("optimizer")
    return f"{name} with {choice('solver')}" if has_solver(config) else name


def has_solver(config: DictConfig) -> bool:
    """Whether the optimizer makes use of the group ``solver``.

    Args:
        config: The composed settings.

    Returns:
        True if it refers to it.
    """
    return "${solver." in str(plain(config)["optimizer"])


def overrides() -> list[str]:
    """The settings of the command line, of the command that is running."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as nested dicts and lists of plain values, for checkpoints and reports.

    Args:
        config: Any configuration. Interpolations stay as they are written, since their values
            (dtypes, enums) may not be plain.

    Returns:
        The dict.
    """
    container = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def one_sentence(error: Exception) -> str:
    """What an error of Hydra or OmegaConf says, without its traces of the machinery.

    Args:
        error: The error.

    Returns:
        One line, with the nearest name that exists where a name does not.
    """
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not of the form key=value, or its value is malformed."
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    text = "\n".join(str(cause).partition("Config search path")[0] for cause in causes)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [x for x in lines if not x.startswith(("full_key:", "object_type=", "See https:"))]
    parent, key = (getattr(causes[-1], name, None) for name in ("parent_node", "key"))
    near = difflib.get_close_matches(str(key), [str(k) for k in parent or ()], n=3)
    lines += [f"Did you mean {' or '.join(near)}?"] if near and key not in near else []
    return re.sub(
        r"(?<=[^.:?!;,]) (?=(To append|Key|Did|Value|Invalid|Available)\b)", ". ", " ".join(lines)
    )
