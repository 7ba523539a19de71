"""From YAML files and ``key=value`` words to a checked configuration.

The files are composed by Hydra's compose API. They lie in ``configs/``.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import (
    CompactHydraException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dash_shampoo

GROUPS = ("optimizer", "model", "data", "parallelism", "experiment")
# What only `train` and `demo` have beside them.
TRAIN_GROUPS = (*GROUPS, "parameter_groups")
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class SettingsError(Exception):
    """A setting that does not exist or can't be used; the message says which and why."""


@dataclass
class ScheduleSettings:
    """Learning rate over the run, as a factor on each group's own lr.

    Attributes:
        warmup_fraction: Share of the steps in which the factor rises. (Default: 0.1)
        start_factor: Factor at the first step. (Default: 0.01)
        end_factor: Factor at the last step. (Default: 0.1)
    """

    warmup_fraction: float = 0.1
    start_factor: float = 0.01
    end_factor: float = 0.1


@dataclass
class TrainSettings:
    """The scalar settings of ``python -m experiments train``; ``configs/train.yaml`` explains them."""

    steps: int = 200
    batch_size: int = 16
    micro_batch_size: int | None = None
    sequence_length: int = 128
    seed: int = 42
    clip_grad_norm: float | None = 1.0
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    num_threads: int | None = None
    evaluate_every: int = 50
    validation_batches: int = 8
    log_every: int = 1
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    output_dir: str | None = None
    resume: str = "auto"
    progress: bool = True

    def check(self) -> None:
        """Check every value.

        Raises:
            SettingsError: With the name of the setting, its value and the allowed range.
        """
        for name in ("steps", "batch_size", "sequence_length", "validation_batches", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("evaluate_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0 (0: never)")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, ">= 1")
        choices = {"precision": ("fp32", "fp64", "bf16"), "resume": ("auto", "true", "false")}
        for name, allowed in choices.items():
            chosen = getattr(self, name)
            _require(chosen in allowed, name, chosen, "one of " + ", ".join(allowed))
        if self.micro_batch_size is not None:
            divides = self.micro_batch_size >= 1 and self.batch_size % self.micro_batch_size == 0
            _require(divides, "micro_batch_size", self.micro_batch_size, "a divisor of batch_size")
        if self.clip_grad_norm is not None:
            _require(self.clip_grad_norm > 0, "clip_grad_norm", self.clip_grad_norm, "> 0 or null")
        if self.num_threads is not None:
            _require(self.num_threads >= 1, "num_threads", self.num_threads, ">= 1 or null")
        for entry in fields(self.schedule):
            value = getattr(self.schedule, entry.name)
            is_share = math.isfinite(value) and 0 <= value <= 1
            _require(is_share, f"schedule.{entry.name}", value, "in [0, 1]")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise SettingsError(f"{name}={value} must be {allowed}.")


def config_dir() -> Path:
    """The folder of the YAML files that come with the checkout.

    Returns:
        ``configs/`` beside this package.
    """
    return Path(__file__).resolve().parents[1] / "configs"


def options(group: str, extra_dir: Path | None = None) -> list[str]:
    """Names that a group can be set to.

    Args:
        group: A folder of YAML files, such as ``optimizer``.
        extra_dir: A second folder to look in, as for ``--config-dir``.

    Returns:
        The sorted names.
    """
    places = [config_dir(), *([extra_dir] if extra_dir else [])]
    return sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})


def register_resolvers() -> None:
    """Let YAML name dtypes and enums as Meta's example configs do, ``${torch_dtype:float32}``."""
    table = {
        "torch_dtype": _DTYPES,
        "weight_decay_type": dash_shampoo.WeightDecayType.__members__,
        "fsdp_param_strategy": dash_shampoo.FSDPParamAssignmentStrategy.__members__,
    }
    for resolver, members in table.items():

        def resolve(name: str, resolver: str = resolver, members: Any = members) -> Any:
            if name not in members:
                raise SettingsError(
                    f"${{{resolver}:{name}}}: unknown name; one of {', '.join(members)}."
                )
            return members[name]

        OmegaConf.register_new_resolver(resolver, resolve, replace=True)


def compose_train(overrides: Sequence[str], extra_dir: Path | None = None) -> DictConfig:
    """Compose ``train.yaml`` with the overrides of the command line.

    Args:
        overrides: Hydra overrides, such as ``optimizer=adamw`` or ``optimizer.lr=1e-3``.
        extra_dir: A folder with further YAML files, laid out like ``configs/``.

    Returns:
        The composed configuration, with interpolations unresolved. Its key ``choices`` tells
        which file each group was read from.

    Raises:
        SettingsError: If an override is malformed or names something that does not exist.
    """
    register_resolvers()
    words = list(overrides)
    if extra_dir is not None:
        if not extra_dir.is_dir():
            raise SettingsError(f"--config-dir {extra_dir}: no such folder.")
        words.append(f"hydra.searchpath=[file://{extra_dir.resolve()}]")
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = compose("train", words, return_hydra_config=True)
    except (HydraException, CompactHydraException, OmegaConfBaseException) as error:
        raise SettingsError(_explain(error, words, extra_dir)) from error
    choices = {name: composed.hydra.runtime.choices.get(name) for name in TRAIN_GROUPS}
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    composed["choices"] = choices
    OmegaConf.set_struct(composed, True)
    return composed


def _explain(error: Exception, words: Sequence[str], extra_dir: Path | None) -> str:
    """A message that names the override and the nearest things that exist."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not of the form key=value, or its value is malformed."
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if key in TRAIN_GROUPS and isinstance(error, MissingConfigException):
            known = options(key, extra_dir)
            if value not in known:
                return f"There is no {key}={value}. Available: {', '.join(known)}."
        if f"'{key}'" in str(error) and not isinstance(error, MissingConfigException):
            known = sorted(set(_all_keys()))
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            return (
                f"There is no setting {key!r}.{hint} `python -m experiments train --cfg job` prints all; "
                f"+{word.lstrip('+')} adds a new one."
            )
    return str(error).strip().replace("\n", " ")


def _all_keys() -> Iterator[str]:
    yield from TRAIN_GROUPS
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        composed = compose("train")
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(composed, resolve=False))]
    while pending:
        prefix, node = pending.pop()
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                pending.append((f"{prefix}{key}.", value))


def train_settings(config: DictConfig) -> TrainSettings:
    """The scalar settings of a composed configuration, checked.

    Args:
        config: What `compose_train` returned.

    Returns:
        The settings as a dataclass.

    Raises:
        SettingsError: If a value has the wrong type or is out of range.
    """
    names = [entry.name for entry in fields(TrainSettings)]
    schema = OmegaConf.structured(TrainSettings)
    try:
        scalars = {name: config[name] for name in names}
        if isinstance(scalars["resume"], bool):  # `resume=true` is a bool in YAML
            scalars["resume"] = str(scalars["resume"]).lower()
        settings = OmegaConf.to_object(OmegaConf.merge(schema, scalars))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise SettingsError(f"{key}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, TrainSettings)
    settings.check()
    return settings


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as nested dicts and lists of plain values, for checkpoints and reports.

    Args:
        config: Any configuration. Interpolations stay as they are written, since their values
            (dtypes, enums) may not be plain.

    Returns:
        The dict.
    """
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
