"""The settings of the commands: names, types, defaults and meanings, each in one place.

The classes below are what Hydra checks every word of the command line against. The groups
(``optimizer``, ``model``, ...) are filled from the YAML files of ``configs/``.
"""

import inspect
import textwrap
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

import dash_shampoo
from experiments.composition import choice, has_solver, overrides

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class SettingsError(Exception):
    """A setting that does not exist or can't be used; the message says which and why."""


class Precision(Enum):
    """Arithmetic of the model; ``bf16`` is fp32 weights and a forward pass under autocast."""

    fp32 = "fp32"
    fp64 = "fp64"
    bf16 = "bf16"


class Resume(Enum):
    """``auto`` goes on if there is a checkpoint, ``always`` insists, ``never`` starts over."""

    auto = "auto"
    always = "always"
    never = "never"


class Averaging(Enum):
    """Of the weights: an exponential moving average, or the plain mean of the last part."""

    none = "none"
    ema = "ema"
    swa = "swa"


@dataclass
class TrainSettings:
    """The settings of ``train``.

    Attributes:
        steps: Steps of the schedule.
        batch_size: Sequences per step, of all processes together.
        micro_batch_size: Sequences per forward pass of a process; null: all of its share at once.
        sequence_length: Tokens of a sequence.
        seed: Of the initial weights, and of the order of the batches.
        data_seed: Of the order of the batches alone; null: seed.
        clip_grad_norm: Largest norm of the gradient; null: no clipping.
        device: auto (cuda where there is one, else cpu), cpu, cuda or cuda:N.
        precision: fp32, fp64, or bf16 (fp32 weights, forward pass under autocast).
        compile: Compile the model's forward pass.
        num_threads: Of the CPU, per process; null: torch's choice.
        evaluate_every: Steps between validations; 0: only before the first and after the last.
        validation_batches: A fixed set of batches, spread over the held-out tokens.
        log_every: Steps between records; each waits for the device.
        checkpoint_every: 0: only at the end, and when stopped by Ctrl-C or SIGTERM.
        keep_checkpoints: How many of the newest stay.
        keep_every: Steps between checkpoints that stay for good; 0: none.
        stop_after: Stop after this step of the schedule; null: after the last.
        averaging: none, ema, or swa (the mean of the steps from average_from on); evaluated beside
            the weights themselves.
        diagnose_every: Steps between records of every block of DashShampoo: condition, residual and norms
            of factor matrices and roots, failures, the size of the update beside the weights'; 0: none.
        sample_prompts: The model's text after each of these is recorded at every validation.
        sample_length: Tokens of a sample.
        peak_tflops: What a device computes at most, for the share of it that is used (mfu); null: of
            A100, H100 and H200 it is known.
        ema_decay: Of averaging=ema.
        average_from: Share of the steps after which averaging begins.
        sinks: Where records go beside output_dir/metrics.jsonl: [tensorboard, wandb] or one of them.
        output_dir: Null: a new folder below outputs/. With several runs: the folder of them all.
        resume: auto (go on if output_dir holds a checkpoint), always (it must), never (start over).
        resume_from: Another run's folder, or a checkpoint, to begin from where output_dir has none.
        progress: Progress bar on a terminal, one line per validation elsewhere.
    """

    steps: int = 200
    batch_size: int = 16
    micro_batch_size: int | None = None
    sequence_length: int = 128
    seed: int = 42
    data_seed: int | None = None
    clip_grad_norm: float | None = 1.0
    device: str = "auto"
    precision: Precision = Precision.fp32
    compile: bool = False
    num_threads: int | None = None
    evaluate_every: int = 50
    validation_batches: int = 8
    log_every: int = 1
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    stop_after: int | None = None
    averaging: Averaging = Averaging.none
    ema_decay: float = 0.999
    average_from: float = 0.0
    diagnose_every: int = 0
    sample_prompts: list[str] = field(default_factory=list)
    sample_length: int = 64
    peak_tflops: float | None = None
    sinks: list[str] = field(default_factory=list)
    output_dir: str | None = None
    resume: Resume = Resume.auto
    resume_from: str | None = None
    progress: bool = True
    # Groups of YAML files.
    optimizer: Any = MISSING
    solver: Any = MISSING
    schedule: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    parameter_groups: Any = MISSING
    parallelism: Any = MISSING


@dataclass
class DemoSettings(TrainSettings):
    """The settings of ``demo``: those of every run, and what is compared.

    Attributes:
        runs: What is compared; ~runs.NAME leaves one out.
        turn: Steps that a run takes before it is the next one's turn.
        note: What the report says about the settings.
    """

    runs: Any = MISSING
    turn: int = 1
    note: str = ""


@dataclass
class ClassifySettings:
    """The settings of ``classify``.

    Attributes:
        epochs: How often all images are seen.
        batch_size: Images of a step, of all processes together.
        channels: Of the convolution.
        bias: Whether the linear layer has one.
        seed: Of the initial weights and of the order of the images.
        device: auto (cuda where there is one, else cpu), cpu, cuda or cuda:N.
        num_threads: Of the CPU, per process; null: torch's choice.
        output_dir: Where metrics.jsonl goes, a line per epoch; null: nowhere.
    """

    epochs: int = 1
    batch_size: int = 128
    channels: int = 64
    bias: bool = True
    seed: int = 42
    device: str = "auto"
    num_threads: int | None = None
    output_dir: str | None = None
    # Groups of YAML files.
    optimizer: Any = MISSING
    solver: Any = MISSING
    schedule: Any = MISSING
    images: Any = MISSING
    parameter_groups: Any = MISSING
    parallelism: Any = MISSING


@dataclass
class PlanSettings:
    """The settings of ``plan``.

    Attributes:
        world_size: Number of ranks; null: 1, with sweep 1,024.
        micro_batch_size: Sequences of a rank's forward pass.
        details: All tables: blocks, state, matmuls and roofline of every rank.
        sweep: A table over 1, 2, 4, ... ranks instead of one plan.
        hardware: For the roofline: A100, H100 or H200.
        tf32: Whether matmuls outside the inverse roots use TF32.
        vocab_size: Tokens in the vocabulary of the model; null: that of data.
        sequence_length: Tokens of a sequence.
        precision: fp32, fp64 or bf16, as of train.
        format: text or json.
    """

    world_size: int | None = None
    micro_batch_size: int = 16
    details: bool = False
    sweep: bool = False
    hardware: str = "H100"
    tf32: bool = False
    vocab_size: int | None = None
    sequence_length: int = 1024
    precision: Precision = Precision.fp32
    format: str = "text"
    # Groups of YAML files.
    optimizer: Any = MISSING
    solver: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    parameter_groups: Any = MISSING
    parallelism: Any = MISSING


_AT_LEAST = {
    "steps": 1,
    "epochs": 1,
    "channels": 1,
    "batch_size": 1,
    "sequence_length": 1,
    "validation_batches": 1,
    "log_every": 1,
    "keep_checkpoints": 1,
    "turn": 1,
    "num_threads": 1,
    "micro_batch_size": 1,
    "world_size": 1,
    "vocab_size": 1,
    "evaluate_every": 0,
    "checkpoint_every": 0,
    "keep_every": 0,
    "stop_after": 1,
    "diagnose_every": 0,
    "sample_length": 1,
}


def check(config: DictConfig) -> None:
    """Check every value that has a range.

    Args:
        config: The composed settings of any command.

    Raises:
        SettingsError: With the name of the setting, its value and the allowed range.
    """
    for name, least in _AT_LEAST.items():
        value = config.get(name)
        require(value is None or value >= least, name, value, f"at least {least}")
    if (piece := config.get("micro_batch_size")) is not None and "batch_size" in config:
        require(
            config.batch_size % piece == 0, "micro_batch_size", piece, "a divisor of batch_size"
        )
    for name in ("ema_decay", "average_from"):
        require(0 <= config.get(name, 0) <= 1, name, config.get(name), "in [0, 1]")
    norm = config.get("clip_grad_norm")
    require(norm is None or norm > 0, "clip_grad_norm", norm, "> 0 or null")
    peak = config.get("peak_tflops")
    require(peak is None or peak > 0, "peak_tflops", peak, "> 0 or null")
    unused = [word for word in overrides() if word.startswith(("solver=", "solver."))]
    if unused and not has_solver(config):
        raise SettingsError(
            f"{unused[0]} was given, but optimizer={choice('optimizer')} has no use for a solver; "
            "optimizer=dash has."
        )


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Refuse a value.

    Args:
        condition: Whether it is good.
        name: Of the setting.
        value: As it was given.
        allowed: What is allowed, in words.

    Raises:
        SettingsError: If the condition does not hold.
    """
    if not condition:
        raise SettingsError(f"{name}={value} must be {allowed}.")


def dtype_of(name: str | None, key: str) -> torch.dtype | None:
    """A dtype by its name.

    Args:
        name: Such as ``bfloat16``, or None.
        key: The setting, for messages.

    Returns:
        The dtype, or None.

    Raises:
        SettingsError: If there is none of this name.
    """
    require(name is None or name in _DTYPES, key, name, f"one of {', '.join(_DTYPES)}, or null")
    return None if name is None else _DTYPES[name]


def register() -> None:
    """Tell Hydra the settings, their help, and the dtypes and enums that YAML may name."""
    store = ConfigStore.instance()
    for schema in (TrainSettings, DemoSettings, ClassifySettings, PlanSettings):
        command = schema.__name__.removesuffix("Settings").lower()
        store.store(f"{command}_settings", schema)
        store.store(command, _help(command, schema), group="hydra/help")
    tables: dict[str, Any] = {
        "torch_dtype": _DTYPES,
        "weight_decay_type": dash_shampoo.WeightDecayType.__members__,
        "fsdp_param_strategy": dash_shampoo.FSDPParamAssignmentStrategy.__members__,
    }
    for resolver, members in tables.items():

        def resolve(name: str, resolver: str = resolver, members: Any = members) -> Any:
            if name not in members:
                raise SettingsError(
                    f"${{{resolver}:{name}}}: unknown name; one of {', '.join(members)}."
                )
            return members[name]

        OmegaConf.register_new_resolver(resolver, resolve, replace=True)


def _help(command: str, schema: type) -> dict[str, str]:
    parts = [(inspect.getdoc(c) or "").partition("Attributes:\n") for c in schema.__mro__[:-1]]
    meanings = "\n".join(textwrap.dedent(part[2]).strip() for part in parts)
    template = (
        f"usage: python -m experiments {command} [--multirun] [--cfg job] [GROUP=FILE] [KEY=VALUE] ...\n\n"
        f"groups, one file of each:\n$APP_CONFIG_GROUPS\n\nsettings:\n{meanings}\n\n"
        "as composed now:\n$CONFIG\n--hydra-help tells what Hydra offers beside it."
    )
    return {"app_name": command, "header": "", "footer": "", "template": template}
