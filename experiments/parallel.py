"""Processes and sharding: one process, DDP, FSDP2 (`fully_shard`) or HSDP2 under torchrun."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from experiments.builders import build
from experiments.settings import SettingsError, dtype_of

STRATEGIES = ("none", "ddp", "fully_shard", "hybrid_shard")


@dataclass(frozen=True)
class Process:
    """This process among those of the run.

    Attributes:
        rank: 0 to ``world_size - 1``.
        world_size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average over the processes.

        Args:
            value: A scalar tensor of this process.

        Returns:
            A new scalar tensor, the same on all processes.
        """
        result = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(result)
            result /= self.world_size
        return result

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any process: all get the same answer.

        Args:
            flag: This process's flag.

        Returns:
            The answer.
        """
        return bool(self.largest(float(flag)))

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def largest(self, value: float) -> float:
        """The largest value of all processes.

        Args:
            value: This process's value.

        Returns:
            The maximum, the same on all processes.
        """
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared.item())

    def gathered(self, value: Any) -> list[Any]:
        """What all processes have, on all of them.

        Args:
            value: This process's value, picklable.

        Returns:
            One value per process.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: str) -> str:
        """The first process's value, on all.

        Args:
            value: This process's value.

        Returns:
            Rank 0's value.
        """
        if self.world_size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]


@contextmanager
def process_group(config: DictConfig, device_name: str) -> Iterator[Process]:
    """Join the process group that the parallelism asks for, and leave it afterwards.

    Args:
        config: The group ``parallelism``.
        device_name: ``auto``, ``cpu``, ``cuda`` or a device of torch.

    Yields:
        This process.

    Raises:
        SettingsError: If the parallelism and the way the command was started don't fit, or there
            is no such device.
    """
    strategy = config.strategy
    if strategy not in STRATEGIES:
        raise SettingsError(f"parallelism.strategy={strategy}: one of {', '.join(STRATEGIES)}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "none":
        if world_size > 1:
            raise SettingsError(
                f"parallelism=none, but torchrun started {world_size} processes. Choose "
                "parallelism=ddp, fully_shard or hybrid_shard."
            )
        yield Process(0, 1, _device(device_name, 0))
        return
    if "RANK" not in os.environ:
        raise SettingsError(
            f"parallelism={strategy} needs torchrun: torchrun --nproc-per-node N -m "
            "experiments train ..."
        )
    device = _device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _join("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def leave(code: int | None) -> NoReturn:
    """Ends the process with an exit code, when everything is done and written.

    One of several processes ends without the interpreter's own shutdown: threads of the collectives that
    are still there abort it now and then ("terminate called without an active exception"), and a run that
    is complete would count as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _join(backend: str) -> None:
    """Form the process group; again after a restart by torchrun."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # The count is one node's own, so that several nodes might not agree on a name made of it.
    if restart == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    # torchrun's store outlives a restart, and the addresses of the dead processes are still in it.
    store, rank, world_size = next(rendezvous("env://"))
    store = PrefixStore(f"restart_{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device={name}: {error}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(f"device={name}, but torch finds no CUDA device.")
        return torch.device("cuda", local_rank if device.index is None else device.index)
    return device


def parallelise(
    model: nn.Module, config: DictConfig, process: Process
) -> tuple[nn.Module, Any | None]:
    """Wrap or shard a model.

    Args:
        model: Built equally on every process, already on its device. Its ``blocks``, if it has
            any, become units of sharding.
        config: The group ``parallelism``.
        process: This process.

    Returns:
        The module to call, and the `distributed_config` for Distributed Shampoo, or None.

    Raises:
        SettingsError: If the number of processes doesn't fit.
    """
    match config.strategy:
        case "none":
            return model, None
        case "ddp":
            devices = [process.device] if process.device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=devices)
            return wrapped, build(config.distributed_config, "parallelism.distributed_config")
        case "fully_shard":
            mesh = init_device_mesh(process.device.type, (process.world_size,))
            distributed_config = build(config.distributed_config, "parallelism.distributed_config")
        case _:
            replicas = config.replicate_degree
            if replicas < 1 or process.world_size % replicas != 0:
                raise SettingsError(
                    f"parallelism.replicate_degree={replicas} must divide the number of "
                    f"processes, {process.world_size}."
                )
            mesh = init_device_mesh(
                process.device.type,
                (replicas, process.world_size // replicas),
                mesh_dim_names=("replicate", "shard"),
            )
            distributed_config = build(
                config.distributed_config, "parallelism.distributed_config", device_mesh=mesh
            )
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_of(config.param_dtype, "parallelism.param_dtype"),
        reduce_dtype=dtype_of(config.reduce_dtype, "parallelism.reduce_dtype"),
    )
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, distributed_config


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward pass in this context averages gradients over the processes.

    Args:
        model: What `parallelise` returned.
        enabled: False for all but the last micro-batch of a step: one communication suffices.

    Yields:
        Nothing.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield
