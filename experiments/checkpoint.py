"""Checkpoints: folders ``step_00000100`` that appear whole or not at all.

A checkpoint is written into a folder of another name, flushed, and renamed. One process writes
``state.pt``, a plain ``torch.save`` file that loads with ``weights_only=True``; with several
processes the tensors go through ``torch.distributed.checkpoint``, and ``state.pt`` holds the rest.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

FORMAT_VERSION = 1
_PREFIX = "step_"
_STATE_FILE = "state.pt"
_SHARDS = "shards"


def find_latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step.

    Args:
        folder: Where checkpoints are; need not exist.

    Returns:
        Its folder, or None where there is none.
    """
    return max(_complete(folder), default=None)


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if (p / _STATE_FILE).is_file())


def save(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]
) -> Path:
    """Write a checkpoint; every process calls this.

    Args:
        folder: Where checkpoints are; made if missing. Shared by all processes.
        step: Number of steps taken.
        model: Its parameters and buffers are saved.
        optimizer: Its state and the plain values of its groups are saved.
        progress: Further plain values and tensors, such as the sampler's state.

    Returns:
        The folder of this checkpoint.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f"tmp_{final.name}"
    document: dict[str, Any] = {"version": FORMAT_VERSION, "step": step, **progress}
    if _is_first():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if _is_distributed():
        dist.barrier()
        state_dict_saver.save(_sharded_state(model, optimizer), checkpoint_id=temporary / _SHARDS)
    else:
        document["model"] = model.state_dict()
        document["optimizer"] = without_configs(optimizer.state_dict())
    if _is_first():
        with (temporary / _STATE_FILE).open("wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():  # only a run that was continued and stopped at once gets here
            os.rename(final, replaced := temporary.with_name(f"old_{final.name}"))
            os.rename(temporary, final)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, final)
    if _is_distributed():
        dist.barrier()
    return final


def read(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint: ``step`` and what was given as `progress`, for `restore` too.

    Args:
        path: The checkpoint's folder.

    Returns:
        The entries, on the CPU.

    Raises:
        ValueError: If the checkpoint is of another format, or was written by one process and is
            read by several, or the other way round.
    """
    document: dict[str, Any] = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)
    if document["version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format {document['version']}, not {FORMAT_VERSION}.")
    if _is_distributed() != (path / _SHARDS).is_dir():
        raise ValueError(
            f"{path} was written with{'out' if _is_distributed() else ''} torch.distributed; "
            "continue it the same way."
        )
    return document


def restore(path: Path, document: Mapping[str, Any], model: nn.Module, opt: Optimizer) -> None:
    """Put a checkpoint's state into a model and an optimizer; every process calls this.

    Args:
        path: The checkpoint's folder.
        document: What `read` returned.
        model: Built with the settings of the saved run.
        opt: The optimizer, likewise.
    """
    if _is_distributed():
        state = _sharded_state(model, opt)
        state_dict_loader.load(state, checkpoint_id=path / _SHARDS)
        set_model_state_dict(model, state["model"])
        current = get_optimizer_state_dict(model, opt)
        set_optimizer_state_dict(model, opt, with_configs_of(state["optimizer"], current))
    else:
        model.load_state_dict(document["model"])
        opt.load_state_dict(with_configs_of(document["optimizer"], opt.state_dict()))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints.

    Args:
        folder: Where checkpoints are.
        keep: How many stay.
    """
    if _is_first():
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)


def _sharded_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": without_configs(get_optimizer_state_dict(model, optimizer)),
    }


def without_configs(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state without config objects in its groups.

    Config objects come from the YAML at every start; only plain values and tensors, which
    ``torch.load(weights_only=True)`` accepts, are kept.

    Args:
        state: What ``optimizer.state_dict()`` returned.

    Returns:
        A new dict that shares the tensors.
    """
    groups = [{k: v for k, v in g.items() if _is_plain(v)} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def with_configs_of(state: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `without_configs`, with the configs of the present optimizer.

    Args:
        state: What `without_configs` returned.
        current: What ``optimizer.state_dict()`` returns now.

    Returns:
        A state dict for ``optimizer.load_state_dict``.

    Raises:
        ValueError: If the number of groups differs.
    """
    if len(state["param_groups"]) != len(current["param_groups"]):
        raise ValueError(
            f"The checkpoint has {len(state['param_groups'])} parameter groups, the optimizer "
            f"{len(current['param_groups'])}."
        )
    pairs = zip(state["param_groups"], current["param_groups"], strict=True)
    return {**state, "param_groups": [{**now, **saved} for saved, now in pairs]}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in cast("list[object]", value))
    # By exact type: an enum may be a str or an int too.
    return value is None or type(value) in (bool, int, float, str) or torch.is_tensor(value)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_first() -> bool:
    return not _is_distributed() or dist.get_rank() == 0
