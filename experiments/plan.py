"""``python -m experiments plan``: what an optimizer costs on many ranks, before it runs.

No GPU is needed, and nothing is allocated: whether a training step fits the device, beside AdamW; on
request blocks, buckets and stacks of every rank, bytes of optimizer state, bytes communicated, matmul
FLOPs and a roofline of the step.
"""

import functools
import json
import logging
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import dash_shampoo
from dash_shampoo.planning import (
    DEVICES,
    OptimizerPlan,
    Parallelism,
    plan_optimizer,
)
from experiments.builders import (
    build,
    build_data,
    build_model,
    build_optimizer,
    parameter_groups,
)
from experiments.composition import choice, optimizer_name
from experiments.corpus import BYTE_VOCABULARY, DEFAULT_PIECES
from experiments.fit import fit_table, fits
from experiments.memory import ModelMemory, model_memory
from experiments.model import count_parameters
from experiments.plan_report import plan_record, plan_text, sweep_record, sweep_text
from experiments.settings import Precision, SettingsError, require

_LARGEST_SWEEP = 1024
_PAPERS_VOCABULARY = 32_000


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
    vocabulary = _vocabulary(config)
    with torch.device("meta"):
        model = _model(config, vocabulary)
    names = f"{choice('model')}, {optimizer_name(config)}"
    is_adamw = config.optimizer._target_ == "torch.optim.AdamW"
    if config.sweep:
        largest = config.world_size or _LARGEST_SWEEP
        sizes = [2**power for power in range(largest.bit_length()) if 2**power < largest]
        plans = [_plan(config, model, size) for size in [*sizes, largest]]
        if config.format == "json":
            return json.dumps(sweep_record(plans), indent=1) + "\n"
        return sweep_text(plans, names)
    world_size = config.world_size or 1
    plan = None if is_adamw else _plan(config, model, world_size)
    memory, unknown = _memory(config, vocabulary, model)
    device = DEVICES[config.hardware]
    workspace = _workspace(config)
    rows = fits(
        optimizer_name(config),
        plan,
        memory,
        not unknown,
        _parallelism(config, world_size),
        device,
        workspace,
    )
    if config.format == "json":
        record = {} if plan is None else plan_record(plan)
        return json.dumps({**record, "fits": [row.record() for row in rows]}, indent=1) + "\n"
    return "\n".join(
        [
            f"{choice('model')}, vocabulary {vocabulary:,}: {count_parameters(model):,} parameters, "
            f"{config.parallelism.strategy} on {world_size} rank{'s' if world_size > 1 else ''}, "
            f"{config.micro_batch_size} x {config.sequence_length} tokens, {config.precision.name}; "
            f"{device.description}\n",
            fit_table(rows),
            *([f"The activations are not counted: {unknown}\n"] if unknown else []),
            "Counted for an eager model, without a device; the milliseconds are the roofline of the "
            "optimizer's step.\ndetails=true has every rank, sweep=true 1 to 1,024 ranks.\n",
            *([plan_text(plan, names)] if config.details and plan else []),
        ]
    )


def _vocabulary(config: DictConfig) -> int:
    """That of the model, else of the data, else of the paper's."""
    data = config.data
    if (own := config.vocab_size or data.get("vocab_size")) is not None:
        if type(own) is not int or own < 1:
            raise SettingsError(f"data.vocab_size={own} must be a whole number of at least 1.")
        return own
    if "tokenizer" in data:
        return BYTE_VOCABULARY if data.tokenizer == "bytes" else DEFAULT_PIECES
    if OmegaConf.is_missing(data, "train") or OmegaConf.is_missing(data, "validation"):
        return _PAPERS_VOCABULARY
    return build_data(config).vocab_size


def _model(config: DictConfig, vocabulary: int) -> torch.nn.Module:
    model = build_model(config.model, vocabulary, config.sequence_length)
    return model.double() if config.precision == Precision.fp64 else model


def _memory(config: DictConfig, vocabulary: int, model: torch.nn.Module) -> tuple[ModelMemory, str]:
    """The memory of the model's passes, and why it can't be counted, or ""."""
    use_bf16 = config.precision == Precision.bf16
    try:
        memory = model_memory(
            lambda: _model(config, vocabulary),
            config.micro_batch_size,
            config.sequence_length,
            use_bf16,
        )
        return memory, ""
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        sizes = [sum(t.numel() * t.element_size() for t in model.parameters())] * 2
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ModelMemory(sizes[0], sizes[1], 0, 0, 0), f"{reason.rstrip('.')}."


def _workspace(config: DictConfig) -> int:
    """The cap on the memory of inverse roots."""
    options = config.optimizer.get("preconditioner_config") or {}
    return int(options.get("max_workspace_bytes", 2**30))


def _parallelism(config: DictConfig, world_size: int) -> Parallelism:
    replicas = config.parallelism.get("replicate_degree", 1)
    try:
        return Parallelism(
            strategy=config.parallelism.strategy,
            world_size=world_size,
            replicate_degree=min(replicas, world_size) if config.sweep else replicas,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _plan(config: DictConfig, model: torch.nn.Module, world_size: int) -> OptimizerPlan:
    strategy = config.parallelism.strategy
    arguments = _optimizer_arguments(config.optimizer)
    if "distributed_config" in config.parallelism:
        # The mesh has no part in the plan, and can't exist in one process.
        mesh = {"device_mesh": None} if strategy == "hybrid_shard" else {}
        arguments["distributed_config"] = build(
            config.parallelism.distributed_config, "parallelism.distributed_config", **mesh
        )
    parallelism = _parallelism(config, world_size)
    try:
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
            f"optimizer._target_={config._target_} can't be planned: only AdamW, DashShampoo and "
            "DistributedShampoo can."
        )
    if constructor.args:
        raise SettingsError("optimizer._args_ can't be planned: give arguments by name.")
    # Its constructor checks them, with a parameter of any kind.
    build_optimizer(config, [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    return dict(constructor.keywords)
