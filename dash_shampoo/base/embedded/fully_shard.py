"""Parameters sharded by `fully_shard`: every process preconditions blocks of its local shards."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.dtensors import local_tensor
from dash_shampoo.base.embedded.gathering import DDPDistributor


class _ShardDistributor(Distributor):
    """Blocks of local shards. They depend on the number of shards, and so does the result."""

    _placements: ClassVar[tuple[type, ...]]

    def is_foreign_block(self, param: Tensor, key: str) -> bool:
        """Whether a key of the state is a block of another process, of this shard or another."""
        match = re.fullmatch(r"rank_(\d+)-block_\d+", key)
        is_of_other_shard = match is not None and int(match[1]) != self._shard_rank()
        return is_of_other_shard or super().is_foreign_block(param, key)

    def _takes(self, placements: tuple[Any, ...]) -> bool:
        # By exact type: a shard of a tensor-parallel shard is a subclass of Shard.
        return tuple(map(type, placements)) == self._placements

    def _select_params(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        return (p for p in super()._select_params(params) if local_tensor(p).numel() > 0)

    def _block_key(self, block_index: int) -> str:
        return f"rank_{self._shard_rank()}-{super()._block_key(block_index)}"

    def _shard_rank(self) -> int:
        return dist.get_rank()


class FullyShardDistributor(_ShardDistributor):
    """Blocks of local shards (FSDP2); nothing is communicated."""

    keeps_a_part = True
    _placements = (Shard,)
    _needs = "parameters placed (Shard) by fully_shard"

    def groups_to_gather_over(self) -> list[dist.ProcessGroup]:
        """The shards of the parameters."""
        return [self._param_group["params"][0].device_mesh.get_group()]


class HybridShardDistributor(_ShardDistributor, DDPDistributor):
    """Blocks of local shards, each with one owner among the replicas of that shard (HSDP2).

    Args:
        *args: As for Distributor; the group's distributed config is a HybridShardDistributedConfig.
        **kwargs: Likewise.

    Raises:
        ValueError: If the mesh is not 2D, if it cannot be cut into groups of
            num_trainers_per_group replicas, or if a parameter is placed otherwise.
    """

    _placements = (Replicate, Shard)
    _needs = "parameters placed (Replicate, Shard) by fully_shard"

    def groups_to_gather_over(self) -> list[dist.ProcessGroup]:
        """As under DDP, then over the shards."""
        return [*super().groups_to_gather_over(), self._config.device_mesh.get_group(1)]

    def _select_params(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        mesh = self._config.device_mesh
        if mesh.ndim != 2:
            raise ValueError(
                f"Invalid device_mesh={mesh}: must have two dimensions, (replicate, shard)."
            )
        return super()._select_params(params)

    def _find_replicas(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._config.device_mesh.get_group(0)
        return group

    def _shard_rank(self) -> int:
        return int(self._config.device_mesh.get_local_rank(1))
