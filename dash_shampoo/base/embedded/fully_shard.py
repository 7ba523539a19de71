"""Parameters sharded by `fully_shard`: every process preconditions its local shards."""

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.dtensors import local_tensor
from dash_shampoo.base.embedded.gathering import is_foreign_shard, select_shards


class FullyShardDistributor(Distributor):
    """Blocks of local shards (FSDP2); nothing is communicated.

    The blocks of a parameter depend on the number of processes, and so does the result.
    """

    keeps_a_part = True

    def groups_to_gather_over(self) -> list[dist.ProcessGroup]:
        """The shards of the parameters."""
        first = self._param_group[keys.PARAMS][0]
        return [first.device_mesh.get_group()]

    def is_foreign_block(self, param: Tensor, key: str) -> bool:
        """Whether a key of the state is a block of another process's shard."""
        del param
        return is_foreign_shard(key, dist.get_rank())

    def _select_params(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        return select_shards(params, (Shard,), "FullyShardDistributedConfig")

    def _local_tensor(self, tensor: Tensor) -> Tensor:
        return local_tensor(tensor)

    def _block_key(self, block_index: int) -> str:
        return f"rank_{dist.get_rank()}-block_{block_index}"
