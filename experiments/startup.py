"""What can be known to fail is told before the first step."""

import shutil
import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiments.parallel import Process
from experiments.settings import Averaging, SettingsError
from experiments.tokens import TokenData


def check_vocabulary(data: TokenData, process: Process) -> None:
    """Look for tokens outside of the vocabulary, where no sidecar vouches for a file.

    Args:
        data: The data.
        process: This process; all share the work.

    Raises:
        SettingsError: If there are any; on every process.
    """
    for name, tokens in data.unchecked:
        largest = int(process.largest(tokens.largest(process.rank, process.world_size)))
        if largest >= data.vocab_size:
            raise SettingsError(
                f"{name} holds token {largest}, outside of its vocabulary of {data.vocab_size}: "
                "data.vocab_size must be larger, or the file is no token file."
            )


def check_disk(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Try to write to a folder, and compare its disk's free space with the size of a checkpoint.

    Args:
        folder: The run's folder; made if missing.
        model: What will be saved.
        optimizer: Likewise.

    Raises:
        SettingsError: If nothing can be written, or a checkpoint will not fit.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SettingsError(
            f"output_dir={folder} can't be written to: {error.strerror}."
        ) from error
    parameters = list(model.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    # An optimizer without state so far will have two moments.
    needed = _bytes(parameters) + max(_bytes(state), 2 * _bytes(parameters))
    if free < needed:
        raise SettingsError(
            f"output_dir={folder} has {free / 2**30:.2f} GiB left, and a checkpoint takes about "
            f"{needed / 2**30:.2f}: free some, or choose another disk."
        )


def _bytes(tensors: list[Tensor] | list[nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def averaged_model(config: DictConfig, model: nn.Module) -> AveragedModel | None:
    """A copy of a model that will hold the average of its weights.

    Args:
        config: The composed settings.
        model: What `parallelise` returned.

    Returns:
        The copy, or None without averaging.

    Raises:
        SettingsError: If the parameters are sharded.
    """
    averaging = config.averaging
    if averaging == Averaging.none:
        return None
    if config.parallelism.strategy not in ("none", "ddp"):
        raise SettingsError(
            f"averaging={averaging.name} needs whole parameters: parallelism=none or ddp."
        )
    ema = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(unwrapped(model), multi_avg_fn=ema if averaging == Averaging.ema else None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel.

    Args:
        model: Any model.

    Returns:
        The model itself.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
