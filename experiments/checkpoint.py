"""Checkpoints: folders ``step_00000100`` that appear whole or not at all.

A checkpoint is written into a folder of another name, flushed, and renamed. One process writes
``state.pt``, a plain ``torch.save`` file that loads with ``weights_only=True``; with several
processes the tensors go through ``torch.distributed.checkpoint``, and ``state.pt`` holds the rest.
"""

import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

FORMAT_VERSION = 2
_PREFIX = "step_"
_STATE_FILE = "state.pt"
_SHARDS = "shards"

Groups = Sequence[Mapping[str, Any]]


class DamagedError(Exception):
    """A checkpoint that can't be read."""


class SaveError(Exception):
    """A checkpoint that couldn't be written, for lack of room or rights."""


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the highest step first.

    Args:
        folder: Where checkpoints are; need not exist.

    Returns:
        Their folders.
    """
    found = (path for path in folder.glob(f"{_PREFIX}*") if is_checkpoint(path))
    return sorted(found, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint.

    Args:
        path: Any path.

    Returns:
        True if it has a checkpoint's main file.
    """
    return (path / _STATE_FILE).is_file()


def remove(path: Path) -> None:
    """Delete a checkpoint.

    Args:
        path: Its folder.
    """
    shutil.rmtree(path)


def tidy(folder: Path) -> None:
    """Remove what an interrupted `save` has left behind; one process calls this.

    Args:
        folder: Where checkpoints are; need not exist.
    """
    for replaced in folder.glob(f"old_{_PREFIX}*"):
        # The process went down between the two renames that replace a checkpoint.
        if not (place := folder / replaced.name.removeprefix("old_")).exists():
            os.rename(replaced, place)
    for leftover in [*folder.glob(f"tmp_{_PREFIX}*"), *folder.glob(f"old_{_PREFIX}*")]:
        shutil.rmtree(leftover)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is not found again.

    Args:
        path: Its folder.

    Returns:
        The new one.
    """
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


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

    Raises:
        SaveError: If it can't be written; on every process.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f"tmp_{final.name}"
    document: dict[str, Any] = {"version": FORMAT_VERSION, "step": step, **progress}
    document["world_size"] = dist.get_world_size() if _is_distributed() else 1
    failure = _on_first(lambda: _make_anew(temporary))
    if failure is None and _is_distributed():
        try:
            state = _sharded_state(model, optimizer)
            state_dict_saver.save(state, checkpoint_id=temporary / _SHARDS)
        except CheckpointException as error:  # on every process, whichever it is that failed
            failure = str(error)
    elif failure is None:
        document["model"] = model.state_dict()
        document["optimizer"] = without_configs(optimizer.state_dict())
    if failure is None:
        failure = _on_first(lambda: _finish(document, temporary, final))
    if failure is not None:
        raise SaveError(f"The checkpoint of step {step} can't be written to {folder}: {failure}.")
    return final


def _on_first(action: Any) -> str | None:
    """Do something on the first process, and tell all what went wrong."""
    failure: list[str | None] = [None]
    if _is_first():
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
            failure = [str(error)]
    if _is_distributed():
        dist.broadcast_object_list(failure, src=0)
    return failure[0]


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(document: dict[str, Any], temporary: Path, final: Path) -> None:
    shards = sorted((temporary / _SHARDS).glob("*")) + sorted(
        (temporary / _SHARDS).glob(".metadata")
    )
    document["files"] = {path.name: path.stat().st_size for path in shards}
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


def read(path: Path) -> dict[str, Any]:
    """The entries of a checkpoint: ``step`` and what was given as `progress`, for `restore` too.

    Args:
        path: The checkpoint's folder.

    Returns:
        The entries, on the CPU.

    Raises:
        DamagedError: If it can't be read, or a file of it is missing or too short.
        ValueError: If the checkpoint is of another format, or was written by one process and is
            read by several, or the other way round.
    """
    try:
        document: dict[str, Any] = torch.load(
            path / _STATE_FILE, map_location="cpu", weights_only=True
        )
        version = document["version"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise DamagedError(f"{path / _STATE_FILE}: {reason}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, not {FORMAT_VERSION}.")
    for name, size in document["files"].items():
        file = path / _SHARDS / name
        if not file.is_file() or file.stat().st_size != size:
            raise DamagedError(f"{file} is missing or was cut off")
    if _is_distributed() != bool(document["files"]):
        raise ValueError(
            f"{path} was written with{'out' if _is_distributed() else ''} torch.distributed; "
            "continue it the same way."
        )
    return document


def restore(
    path: Path, document: Mapping[str, Any], model: nn.Module, opt: Optimizer, configured: Groups
) -> None:
    """Put a checkpoint's state into a model and an optimizer; every process calls this.

    Args:
        path: The checkpoint's folder.
        document: What `read` returned.
        model: Built with the settings of the saved run.
        opt: The optimizer, likewise; where its settings are others, they stay.
        configured: What `plain_groups` returned when `opt` was new.

    Raises:
        DamagedError: If the tensors can't be read.
    """
    saved = document["configured"]
    if not _is_distributed():
        model.load_state_dict(document["model"])
        current = opt.state_dict()
        opt.load_state_dict(_merged(document["optimizer"], current, saved, configured))
        return
    state = _sharded_state(model, opt)
    try:
        state_dict_loader.load(state, checkpoint_id=path / _SHARDS)
    except CheckpointException as error:
        raise DamagedError(f"{path / _SHARDS}: {str(error).splitlines()[0]}") from error
    set_model_state_dict(model, state["model"])
    current = get_optimizer_state_dict(model, opt)
    merged = _merged(state["optimizer"], current, saved, configured)
    set_optimizer_state_dict(model, opt, merged)


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest checkpoints.

    Args:
        folder: Where checkpoints are.
        keep: How many stay.
        keep_every: Those of a multiple of this step stay too; 0: none.
    """
    if _is_first():
        for old in newest_first(folder)[keep:]:
            if not keep_every or int(old.name.removeprefix(_PREFIX)) % keep_every:
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


def plain_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The settings of each group that a checkpoint keeps too.

    Args:
        optimizer: A new one, so that these are the settings that were configured.

    Returns:
        Plain values by name.
    """
    return [
        {
            k: v
            for k, v in group.items()
            if k != "params" and _is_plain(v) and not torch.is_tensor(v)
        }
        for group in optimizer.param_groups
    ]


def _merged(
    state: Mapping[str, Any], current: Mapping[str, Any], saved: Groups, configured: Groups
) -> dict[str, Any]:
    """A state for loading, in which what was configured otherwise than in the saved run wins.

    What only an optimizer itself changes in its groups, such as a step count, is kept.
    """
    if len(state["param_groups"]) != len(current["param_groups"]):
        raise ValueError(
            f"The checkpoint has {len(state['param_groups'])} parameter groups, the optimizer "
            f"{len(current['param_groups'])}."
        )
    groups = []
    for group, now, before, wanted in zip(
        state["param_groups"], current["param_groups"], saved, configured, strict=True
    ):
        changed = {k: v for k, v in wanted.items() if k in before and before[k] != v}
        groups.append({**now, **group, **changed})
    return {**state, "param_groups": groups}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in cast("list[object]", value))
    # By exact type: an enum may be a str or an int too.
    return value is None or type(value) in (bool, int, float, str) or torch.is_tensor(value)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_first() -> bool:
    return not _is_distributed() or dist.get_rank() == 0
