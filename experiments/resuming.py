"""Going on from a checkpoint: which one, whether it fits, and what is set otherwise now."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer

from experiments import checkpoint
from experiments.builders import optimizer_family
from experiments.composition import plain
from experiments.parallel import Process
from experiments.runs import leaves
from experiments.sampler import BatchSampler
from experiments.settings import Resume, SettingsError

# A continued run must agree in these, or the batches and the model would be other ones.
_FIXED = (
    "model",
    "data",
    "parameter_groups",
    "seed",
    "data_seed",
    "sequence_length",
    "batch_size",
    "precision",
    "averaging",
)
# These change nothing that is computed.
_FREE = (
    "output_dir",
    "resume",
    "resume_from",
    "progress",
    "keep_checkpoints",
    "stop_after",
    "sinks",
)

_logger = logging.getLogger("experiments")


def candidates(config: DictConfig, checkpoints: Path, process: Process) -> list[Path]:
    """The checkpoints that a run may go on from, the best first.

    Args:
        config: The composed settings.
        checkpoints: The run's own folder of checkpoints; leftovers in it are removed, and with
            ``resume=never`` all of it.
        process: This process.

    Returns:
        Folders; empty for a run that starts anew.

    Raises:
        SettingsError: If there must be one and there is none.
    """
    if process.is_first:
        if config.resume == Resume.never:
            for path in checkpoint.newest_first(checkpoints):
                checkpoint.remove(path)
        checkpoint.tidy(checkpoints)
    process.wait()
    found = [] if config.resume == Resume.never else checkpoint.newest_first(checkpoints)
    if not found and config.resume_from is not None:
        source = Path(config.resume_from)
        found = [source] if checkpoint.is_checkpoint(source) else []
        found = found or checkpoint.newest_first(source / "checkpoints")
        if not found:
            raise SettingsError(f"resume_from={source}: there is no checkpoint.")
    if config.resume == Resume.always and not found:
        raise SettingsError(f"resume=always, but there is no checkpoint in {checkpoints}.")
    return found


def restore(
    path: Path,
    config: DictConfig,
    process: Process,
    model: nn.Module,
    optimizer: Optimizer,
    sampler: BatchSampler,
    configured: checkpoint.Groups,
) -> dict[str, Any] | None:
    """Put a checkpoint's state into the parts of a run.

    Args:
        path: The checkpoint.
        config: The composed settings.
        process: This process.
        model: Of the run.
        optimizer: Of the run.
        sampler: Of the run.
        configured: Of the optimizer's groups, see `checkpoint.restore`.

    Returns:
        The checkpoint's entries; None if it is damaged, on any process, and the one before should
        be tried.

    Raises:
        SettingsError: If it is of another run.
    """
    damage, state = None, None
    try:
        state = checkpoint.read(path)
    except checkpoint.DamagedError as error:
        damage = str(error)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if not process.any(damage is not None):
        assert state is not None
        _check_same_run(state, config, optimizer, process, path)
        try:
            sampler.load_state_dict(state["sampler"])
            checkpoint.restore(path, state, model, optimizer, configured)
            return state
        except checkpoint.DamagedError as error:
            damage = str(error)
        except (ValueError, RuntimeError, KeyError) as error:
            raise SettingsError(f"{path} does not fit this run: {error}") from error
    if process.is_first:
        aside = checkpoint.set_aside(path)
        _logger.warning("A damaged checkpoint is now %s (%s).", aside, damage)
    process.wait()
    return None


def _check_same_run(
    state: Mapping[str, Any], config: DictConfig, optimizer: Optimizer, process: Process, path: Path
) -> None:
    saved, current = state["config"], plain(config)
    pairs = [(key, saved.get(key), current[key]) for key in _FIXED]
    pairs.append(("optimizer", state["optimizer_family"], optimizer_family(optimizer)))
    if optimizer_family(optimizer) == "DistributedShampoo":
        # Its blocks are dealt out among the processes, and with them its state.
        pairs.append(("number of processes", state["world_size"], process.world_size))
    for key, before, now in pairs:
        if before != now:
            raise SettingsError(
                f"{path} was written with {key}={before}, this run has {key}={now}. Use the same, "
                "another output_dir, or resume=never."
            )


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a continued run has set otherwise than the run before.

    Args:
        saved: The settings in the checkpoint.
        current: Those of now.

    Returns:
        Before and now, by the name of the setting.
    """
    before, now = dict(leaves(saved)), dict(leaves(current))
    names = [name for name in dict.fromkeys([*before, *now]) if name.split(".")[0] not in _FREE]
    return {n: [before.get(n), now.get(n)] for n in names if before.get(n) != now.get(n)}
