"""``python -m experiments plan``: what an optimizer costs on many ranks, before it runs.

No GPU is needed, and nothing is allocated: blocks, buckets and stacks of every rank, bytes of optimizer
state, bytes communicated, matmul FLOPs and a roofline of the step.
"""

import functools
import json
import logging
from typing import Any

import torch
from omegaconf import DictConfig

import dash_shampoo
from dash_shampoo.planning import (
    DEVICES,
    OptimizerPlan,
    Parallelism,
    plan_optimizer,
)
from experiments.builders import build, parameter_groups
from experiments.plan_report import plan_record, plan_text, sweep_record, sweep_text
from experiments.settings import Precision, SettingsError, choice, optimizer_name, require

_LARGEST_SWEEP = 1024


def run(config: DictConfig) -> int:
    """Plan.

    Args:
        config: The composed settings.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    logging.getLogger("dash_shampoo").setLevel(logging.ERROR)
    require(config.hardware in DEVICES, "hardware", config.hardware, f"one of {', '.join(DEVICES)}")
    require(config.format in ("text", "json"), "format", config.format, "text or json")
    print(_answer(config), end="")
    return 0


def _answer(config: DictConfig) -> str:
    model = _model(config)
    names = f"{choice('model')}, {optimizer_name(config)}"
    if not config.sweep:
        plan = _plan(config, model, config.world_size or 1)
        if config.format == "json":
            return json.dumps(plan_record(plan), indent=1) + "\n"
        return plan_text(plan, names)
    largest = config.world_size or _LARGEST_SWEEP
    sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest] + [largest]
    plans = [_plan(config, model, size) for size in sizes]
    if config.format == "json":
        return json.dumps(sweep_record(plans), indent=1) + "\n"
    return sweep_text(plans, names)


def _model(config: DictConfig) -> torch.nn.Module:
    """The model on the meta device: shapes and dtypes only."""
    with torch.device("meta"):
        model = build(
            config.model,
            "model",
            vocab_size=config.vocab_size,
            max_sequence_length=config.sequence_length,
        )
    if not isinstance(model, torch.nn.Module):
        raise SettingsError(f"model._target_={config.model._target_} is not a torch.nn.Module.")
    return model.double() if config.precision == Precision.fp64 else model


def _plan(config: DictConfig, model: torch.nn.Module, world_size: int) -> OptimizerPlan:
    strategy = config.parallelism.strategy
    arguments = _optimizer_arguments(config.optimizer)
    if "distributed_config" in config.parallelism:
        # The mesh has no part in the plan, and can't exist in one process.
        mesh = {"device_mesh": None} if strategy == "hybrid_shard" else {}
        arguments["distributed_config"] = build(
            config.parallelism.distributed_config, "parallelism.distributed_config", **mesh
        )
    replicas = config.parallelism.get("replicate_degree", 1)
    if config.sweep:
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
            device=DEVICES[config.hardware],
            use_tf32=config.tf32,
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
