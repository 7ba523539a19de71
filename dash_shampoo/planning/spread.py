"""Which rank has which part of every parameter, and which of the blocks are its own.

One picture serves all kinds of parallelism. The ranks form a mesh of replicas × shards: `fully_shard`
has one replica, DDP one shard, one process one of each. Every parameter is cut along dimension 0 into
shards, each shard into blocks; where there are several replicas, the blocks of a shard are shared out
among the owners of a group of replicas, and the updates gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dash_shampoo.base import (
    AlignedMemoryCostModel,
    DistributedConfig,
    FSDPParamAssignmentStrategy,
    LoadBalancingConfig,
    assign_owners,
)
from dash_shampoo.planning.blocks import META, BlockCost, ParameterSpec

Strategy = Literal["none", "ddp", "fully_shard", "hybrid_shard"]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How many ranks there are and what they share.

    Attributes:
        strategy: "none": every rank does everything; "ddp": parameters are replicated, blocks shared
            out; "fully_shard": parameters are sharded; "hybrid_shard": sharded within groups of ranks
            and replicated across them, blocks shared out among the replicas. (Default: "none")
        world_size: Number of ranks, at least 1. (Default: 1)
        replicate_degree: For "hybrid_shard" the number of replicas, a divisor of `world_size`.
            (Default: 1)
    """

    strategy: Strategy = "none"
    world_size: int = 1
    replicate_degree: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            known = ", ".join(get_args(Strategy))
            raise ValueError(f"strategy={self.strategy!r} must be one of {known}.")
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size} must be at least 1.")
        if self.replicate_degree < 1 or self.world_size % self.replicate_degree:
            raise ValueError(
                f"replicate_degree={self.replicate_degree} must divide the number of ranks, "
                f"world_size={self.world_size}."
            )

    @property
    def num_shards(self) -> int:
        """Into how many shards a parameter is cut."""
        match self.strategy:
            case "fully_shard":
                return self.world_size
            case "hybrid_shard":
                return self.world_size // self.replicate_degree
            case _:
                return 1

    @property
    def is_gathered(self) -> bool:
        """Whether updates are gathered from the ranks that own their blocks."""
        return self.strategy in ("ddp", "hybrid_shard")

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same shard."""
        return self.world_size // self.num_shards

    def shard_of(self, rank: int) -> int:
        """The shard of a rank; replicas are the outer dimension of the mesh."""
        return rank % self.num_shards

    def replica_of(self, rank: int) -> int:
        """The replica that a rank belongs to."""
        return rank // self.num_shards

    def num_owners(self, distributed_config: object) -> int:
        """Among how many ranks the blocks of a shard are shared out.

        Args:
            distributed_config: The group's; its `num_trainers_per_group` counts.

        Returns:
            A divisor of `num_replicas`; 1 without replicas.

        Raises:
            ValueError: If `num_trainers_per_group` does not divide the number of replicas.
        """
        if not self.is_gathered:
            return 1
        size = getattr(distributed_config, "num_trainers_per_group", -1)
        if size == -1:
            return self.num_replicas
        if not 1 <= size <= self.num_replicas or self.num_replicas % size:
            raise ValueError(
                f"num_trainers_per_group={size} must be -1 or divide the number of replicas, "
                f"{self.num_replicas}."
            )
        return size


def parallelism_of(distributed_config: object) -> Parallelism:
    """How the processes that run now share an optimizer.

    Args:
        distributed_config: The optimizer's.

    Returns:
        The parallelism of its ranks.

    Raises:
        ValueError: If it can't be read off the config.
    """
    name = type(distributed_config).__name__
    mesh = getattr(distributed_config, "device_mesh", None)
    if name == "SingleDeviceDistributedConfig":
        return Parallelism()
    if name == "HybridShardDistributedConfig" and mesh is not None:
        return Parallelism(
            strategy="hybrid_shard", world_size=mesh.size(), replicate_degree=mesh.size(0)
        )
    if name in ("DDPDistributedConfig", "DashDDPDistributedConfig"):
        replicas = getattr(distributed_config, "replicas", None)
        size = replicas.size() if replicas is not None else torch.distributed.get_world_size()
        return Parallelism(strategy="ddp", world_size=size)
    if name == "FullyShardDistributedConfig":
        size = torch.distributed.get_world_size()
        return Parallelism(strategy="fully_shard", world_size=size)
    raise ValueError(f"The parallelism of distributed_config={name} can't be seen: give one.")


def local_shards(spec: ParameterSpec, num_shards: int) -> list[ParameterSpec | None]:
    """The shards of a parameter along dimension 0, as `fully_shard` cuts them.

    Args:
        spec: The whole parameter.
        num_shards: Their number.

    Returns:
        One for each shard; None where nothing is left for it.

    Raises:
        ValueError: If a scalar is to be sharded.

    Examples:
        >>> [shard and shard.shape for shard in local_shards(ParameterSpec((5, 2), torch.float32), 4)]
        [(2, 2), (2, 2), (1, 2), None]
    """
    if num_shards == 1:
        return [spec]
    if not spec.shape:
        raise ValueError("A parameter of shape () can't be sharded; fully_shard wants shape (1,).")
    pieces = torch.empty(spec.shape, device=META).chunk(num_shards)
    shards: list[ParameterSpec | None] = [
        ParameterSpec(tuple(piece.shape), spec.dtype) if piece.numel() else None for piece in pieces
    ]
    return shards + [None] * (num_shards - len(shards))


def check_assignment(distributed_config: object) -> None:
    """Refuse what the plan knows no costs of.

    Args:
        distributed_config: A group's.

    Raises:
        ValueError: If ranks of `fully_shard` are to precondition more than their own shards.
    """
    strategy = getattr(distributed_config, "param_assignment_strategy", None)
    if strategy not in (None, FSDPParamAssignmentStrategy.DEFAULT):
        raise ValueError(f"param_assignment_strategy={strategy} can't be planned: only DEFAULT.")


@dataclass(frozen=True)
class Sharing:
    """Blocks shared out among owners.

    Attributes:
        blocks: The blocks of each owner, in order.
        largest_buffer: Bytes of the updates of the owner that has most of them, and of its flag for
            errors; the others' are padded to it.
    """

    blocks: tuple[tuple[BlockCost, ...], ...]
    largest_buffer: int


def share(
    blocks: Sequence[BlockCost], num_owners: int, distributed_config: DistributedConfig
) -> Sharing:
    """Shares out blocks by the base's own rule, which both bases have in common.

    Args:
        blocks: All blocks of a group, in order.
        num_owners: Among how many.
        distributed_config: The group's, with `load_balancing_config` and `communication_dtype`.

    Returns:
        Who owns what.
    """
    dtype = getattr(distributed_config, "communication_dtype", torch.float32)
    balancing = getattr(distributed_config, "load_balancing_config", None) or LoadBalancingConfig()
    sent = [torch.empty(block.spec.shape, dtype=dtype, device=META) for block in blocks]
    owners = assign_owners(sent, num_owners, balancing.cost_model)
    owned: list[list[BlockCost]] = [[] for _ in range(num_owners)]
    buffers = [0] * num_owners
    aligned = AlignedMemoryCostModel()
    for block, tensor, owner in zip(blocks, sent, owners, strict=True):
        owned[owner].append(block)
        buffers[owner] += int(aligned.cost(tensor))
    return Sharing(tuple(map(tuple, owned)), max(buffers) + aligned.alignment_bytes)
