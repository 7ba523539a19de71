"""The subcommand ``python -m experiments plan``: what an optimizer costs on many ranks, before it runs."""

import argparse
import difflib
import functools
import inspect
import json
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import dash_shampoo
from dash_shampoo.planning import (
    DEVICES,
    Device,
    OptimizerPlan,
    Parallelism,
    plan_optimizer,
)
from experiments.builders import parameter_groups
from experiments.main import fail
from experiments.parallel import build
from experiments.plan_report import plan_record, plan_text, sweep_record, sweep_text
from experiments.settings import (
    TRAIN_GROUPS,
    SettingsError,
    TrainSettings,
    compose_train,
    options,
)

_LARGEST_SWEEP = 1024

_DESCRIPTION = """\
Tell, without a GPU and without allocating anything, what Shampoo keeps and computes on every rank:
blocks, buckets and stacks, bytes of optimizer state, bytes communicated, matmul FLOPs and a roofline
of the step. The model, optimizer and parallelism are chosen as for `python -m experiments train`.
"""
_EXAMPLES = """\
examples:
  python -m experiments plan model=llama_953m world_size=8 max_preconditioner_dim=1024
  python -m experiments plan model=llama_953m world_size=64 parallelism=fully_shard device=H200
  python -m experiments plan model=llama_953m optimizer=dash_eigen sweep=true
  python -m experiments plan model=tiny world_size=2 format=json
"""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What ``plan`` takes beside the groups of ``train``.

    Attributes:
        world_size: Number of ranks. (Default: 1; with sweep the largest, 1024)
        sweep: A table over 1, 2, 4, … ranks instead of one plan. (Default: false)
        device: For the roofline: one of the devices below. (Default: H100)
        tf32: Whether matmuls outside the inverse roots use TF32. (Default: false)
        vocab_size: Tokens in the vocabulary of the model. (Default: 32000)
        format: text or json. (Default: text)
    """

    world_size: int | None = None
    sweep: bool = False
    device: str = "H100"
    tf32: bool = False
    vocab_size: int = 32_000
    format: str = "text"


def parser() -> argparse.ArgumentParser:
    """The parser of the words after ``python -m experiments plan``.

    Returns:
        The parser; its help lists settings, groups and devices.
    """
    result = argparse.ArgumentParser(
        prog="python -m experiments plan",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_epilog(),
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    result.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder with YAML files of your own"
    )
    return result


def _epilog() -> str:
    groups = "\n".join(
        textwrap.fill(
            f"{name:<18}" + ", ".join(options(name)),
            96,
            initial_indent="  ",
            subsequent_indent=" " * 20,
        )
        for name in ("model", "optimizer", "parameter_groups", "parallelism")
    )
    attributes = inspect.getdoc(PlanSettings) or ""
    settings = textwrap.indent(
        textwrap.dedent(attributes.partition("Attributes:\n")[2]).strip(), "  "
    )
    devices = "\n".join(f"  {d.name:<18}{d.description}" for d in DEVICES.values())
    return (
        f"{_EXAMPLES}\nsettings:\n{settings}\n\nArguments of the optimizer can be given by their name "
        "alone (precondition_frequency=10).\nparallelism is ddp where it is not given and there is "
        f"more than one rank.\n\ngroups:\n{groups}\n\ndevices:\n{devices}\n"
    )


def run(words: Sequence[str]) -> int:
    """Carry out ``python -m experiments plan``.

    Args:
        words: The command line after ``plan``.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = parser().parse_intermixed_args(list(words))
        settings, overrides = _split(arguments.overrides)
        config = compose_train(overrides, arguments.config_dir)
        print(_answer(settings, config), end="")
    except SettingsError as error:
        return fail(str(error), 2)
    return 0


def _answer(settings: PlanSettings, config: DictConfig) -> str:
    device = DEVICES[settings.device]
    model = _model(config, settings.vocab_size)
    names = f"{config.choices.model}, {config.choices.optimizer}"
    if not settings.sweep:
        plan = _plan(config, model, settings, settings.world_size or 1, device)
        if settings.format == "json":
            return json.dumps(plan_record(plan), indent=1) + "\n"
        return plan_text(plan, names)
    largest = settings.world_size or _LARGEST_SWEEP
    sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]
    plans = [_plan(config, model, settings, size, device) for size in sizes]
    if settings.format == "json":
        return json.dumps(sweep_record(plans), indent=1) + "\n"
    return sweep_text(plans, names)


def _split(words: Sequence[str]) -> tuple[PlanSettings, list[str]]:
    """The settings of ``plan`` itself, and the overrides for the configuration of ``train``."""
    own = {field.name for field in fields(PlanSettings)}
    arguments = set(inspect.signature(dash_shampoo.DistributedShampoo).parameters) - {"params"}
    known = own | arguments | set(TRAIN_GROUPS) | {field.name for field in fields(TrainSettings)}
    values: dict[str, Any] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~").partition(".")[0].partition("@")[0]
        if not equals and not key.startswith("~"):
            raise SettingsError(f"{word!r} is not of the form key=value.")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise SettingsError(
                f"There is no setting {name!r}.{hint} `python -m experiments plan --help` lists all."
            )
        if key in own:
            values[key] = _parse(key, value)
        elif name in arguments:
            overrides.append(f"++optimizer.{word.lstrip('+')}")
        else:
            overrides.append(word)
    settings = PlanSettings(**values)
    is_chosen = any(word.startswith("parallelism=") for word in overrides)
    if not is_chosen and (settings.sweep or (settings.world_size or 1) > 1):
        overrides.append("parallelism=ddp")
    return settings, overrides


def _parse(key: str, value: str) -> int | bool | str:
    match key:
        case "world_size" | "vocab_size":
            if not value.replace("_", "").isdigit() or int(value) < 1:
                raise SettingsError(f"{key}={value} must be an integer of at least 1.")
            return int(value)
        case "sweep" | "tf32":
            choices = {"true": True, "false": False}
            if value.lower() not in choices:
                raise SettingsError(f"{key}={value} must be true or false.")
            return choices[value.lower()]
        case "device":
            if value.upper() not in DEVICES:
                raise SettingsError(f"device={value} must be one of {', '.join(DEVICES)}.")
            return value.upper()
        case _:
            if value not in ("text", "json"):
                raise SettingsError(f"{key}={value} must be text or json.")
            return value


def _model(config: DictConfig, vocab_size: int) -> torch.nn.Module:
    """The model on the meta device: shapes and dtypes only."""
    with torch.device("meta"):
        model = build(
            config.model,
            "model",
            vocab_size=vocab_size,
            max_sequence_length=config.sequence_length,
        )
    if not isinstance(model, torch.nn.Module):
        raise SettingsError(f"model._target_={config.model._target_} is not a torch.nn.Module.")
    return model.double() if config.precision == "fp64" else model


def _plan(
    config: DictConfig,
    model: torch.nn.Module,
    settings: PlanSettings,
    world_size: int,
    device: Device,
) -> OptimizerPlan:
    strategy = config.parallelism.strategy
    arguments = _optimizer_arguments(config.optimizer)
    if "distributed_config" in config.parallelism:
        # The mesh has no part in the plan, and can't exist in one process.
        mesh = {"device_mesh": None} if strategy == "hybrid_shard" else {}
        arguments["distributed_config"] = build(
            config.parallelism.distributed_config, "parallelism.distributed_config", **mesh
        )
    replicas = config.parallelism.get("replicate_degree", 1)
    if settings.sweep:
        replicas = min(replicas, world_size)
    try:
        parallelism = Parallelism(
            strategy=strategy,
            world_size=world_size,
            replicate_degree=replicas,
        )
        return plan_optimizer(
            parameter_groups(model, config.parameter_groups),
            parallelism=parallelism,
            device=device,
            use_tf32=settings.tf32,
            **arguments,
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SettingsError(str(error)) from error


def _optimizer_arguments(config: DictConfig) -> dict[str, Any]:
    constructor = build(config, "optimizer", _partial_=True)
    is_shampoo = (
        isinstance(constructor, functools.partial)
        and isinstance(constructor.func, type)
        and issubclass(constructor.func, dash_shampoo.DistributedShampoo)
    )
    if not is_shampoo:
        raise SettingsError(
            f"optimizer._target_={config._target_} can't be planned: only DashShampoo and "
            "DistributedShampoo have blocks."
        )
    if constructor.args:
        raise SettingsError("optimizer._args_ can't be planned: give arguments by name.")
    return dict(constructor.keywords)
