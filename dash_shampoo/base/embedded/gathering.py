"""Replicated parameters whose blocks are spread over processes: owners, their state, one all-gather.

A *replica group* holds the same parameters. It is cut into groups of `num_trainers_per_group` processes;
within each, every block has one owner, which keeps its state and computes its update.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.distributed_configs import (
    AlignedMemoryCostModel,
    DDPDistributedConfig,
    HybridShardDistributedConfig,
    assign_owners,
)
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.dtensor_block import DTensorBlockInfo
from dash_shampoo.base.embedded.dtensors import is_dtensor, local_tensor
from dash_shampoo.base.embedded.flight import Flight
from dash_shampoo.base.embedded.group_state import is_refresh_due
from dash_shampoo.base.embedded.replicas import (
    check_same_parameters,
    first_that_differs,
    group_of,
    replicas_of,
)

logger = logging.getLogger(__name__)

# Renamed in torch 2.13, where the old name warns.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class DDPDistributor(Distributor):
    """Blocks of replicated parameters, each with one owner in a group (as ZeRO-1).

    Parameters are plain tensors (DistributedDataParallel) or replicated DTensors (`replicate`).

    Args:
        *args: As for Distributor; the group's distributed config is a DDPDistributedConfig.
        **kwargs: Likewise.

    Raises:
        ValueError: If the processes cannot be cut into groups of num_trainers_per_group, or if a
            parameter is sharded.
    """

    is_shared = True
    flight: Flight
    _error: Exception | None = None
    _is_to_be_compared: bool

    @property
    def _config(self) -> DDPDistributedConfig:
        config: DDPDistributedConfig = self._param_group[keys.DISTRIBUTED_CONFIG]
        return config

    @torch.no_grad()
    def merge_and_block_gradients(self) -> Sequence[Tensor]:
        """As the base class; the first time, all processes compare their parameters."""
        if self._is_to_be_compared:
            self._is_to_be_compared = False
            params = [cut.param for cut in self._cuts]
            if (rank := first_that_differs(params, self.replicas)) is not None:
                logger.warning(
                    "The parameters of rank %d differ from those of the first of its replicas. Are "
                    "they stages of a pipeline, or experts? Then give DashDDPDistributedConfig("
                    "replicas=...) the ranks that hold the same parameters; else broadcast them.",
                    rank,
                )
        return super().merge_and_block_gradients()

    @property
    def keeps_a_part(self) -> bool:  # type: ignore[override]
        """Whether other processes have state that this one lacks."""
        return any(dist.get_world_size(group) > 1 for group in self.groups_to_gather_over())

    def groups_to_gather_over(self) -> list[dist.ProcessGroup]:
        """Process groups over which the parts of the state add up to the whole."""
        return [self._communication_group]

    def substitute(self, error: Exception) -> tuple[Tensor, ...]:
        """Keeps the error until the others, who wait in `update_params`, have heard of it."""
        self._error = error
        return ()

    @torch.no_grad()
    def update_params(
        self, blocked_search_directions: Sequence[Tensor], use_masked_tensors: bool = True
    ) -> None:
        """Adds the search directions to the blocks of all processes; all must call this.

        Where the group's `flight` wants it, the adding and the errors wait until that lands.

        Args:
            blocked_search_directions: One per own block that has a gradient, or of all own blocks.
            use_masked_tensors: Whether only the blocks with a gradient are updated.

        Raises:
            Exception: The one that `substitute` was given.
            RuntimeError: If another process was given one. On a GPU this is noticed where inverse roots
                are due, as it means waiting for the device.
        """
        error, self._error = self._error, None
        self.flight.land()
        directions = tuple(blocked_search_directions)
        if error is None:
            params = self._targets(directions, use_masked_tensors)
        else:
            params, directions = (), ()
            self._flags[dist.get_rank(self._communication_group)].fill_(1.0)
        if self._config.communicate_params:
            if params:
                torch._foreach_add_(params, directions)
            if self._local_buffers:
                torch._foreach_copy_(self._local_buffers, self.local_blocked_params)
            selector = self._global_grad_selector if use_masked_tensors else None
            receive: Callable[[], None] = partial(self._receive, selector)
        else:
            # What has no gradient at its owner gets zeros, and everybody adds all: so replicas stay
            # equal even if they disagree on which parameters have a gradient.
            buffers = self._local_buffers
            if use_masked_tensors:
                buffers = tuple(compress(self._local_buffers, self.local_grad_selector))
            if len(params) < len(self._local_buffers):
                torch._foreach_zero_(self._local_buffers)
            if params:
                torch._foreach_copy_(buffers, directions)
            receive = self._receive_sums
        self.flight.take_off(partial(self._land, self._gather(), receive, error))

    def is_foreign_block(self, param: Tensor, key: str) -> bool:
        """Whether a key of the state is a block of the parameter that another process owns."""
        num_blocks = sum(cut.num_blocks for cut in self._cuts if cut.param is param)
        return key in map(self._block_key, range(num_blocks))

    # ------------------------------------------------------- what other distributors override

    def _select_params(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        for param in params:
            if is_dtensor(param) and not all(p.is_replicate() for p in param.placements):
                raise ValueError(
                    f"A parameter of shape {tuple(param.shape)} is sharded ({param.placements}), but "
                    "DDPDistributedConfig is for replicated parameters. Use "
                    "FullyShardDistributedConfig or HybridShardDistributedConfig for fully_shard; "
                    "tensor-parallel parameters are not supported."
                )
            yield param

    def _find_replicas(self) -> dist.ProcessGroup:
        """The processes that hold the same parameters as this one."""
        return replicas_of(self._config)

    def _local_tensor(self, tensor: Tensor) -> Tensor:
        return local_tensor(tensor)

    def _make_block_info(self, **fields: Any) -> BlockInfo:
        return DTensorBlockInfo(mesh=self._owners_mesh, **fields)

    def _assign_blocks(self) -> tuple[bool, ...]:
        self.replicas = self._find_replicas()
        self.flight = Flight()
        cuts = self._cuts
        self._is_to_be_compared = check_same_parameters(
            [cut.param for cut in cuts], list(map(self._name_of, cuts)), self.replicas
        )

        ranks = dist.get_process_group_ranks(self.replicas)
        size = self._group_size(len(ranks))
        row, column = divmod(ranks.index(dist.get_rank()), size)
        self._communication_group = group_of(ranks[row * size :][:size], self.replicas)
        # Those that own the same blocks, as state tensors are replicated over them.
        device_type = self._param_group[keys.PARAMS][0].device.type
        owners_of_same = group_of(ranks[column::size], self.replicas)
        self._owners_mesh = DeviceMesh.from_group(
            owners_of_same, device_type, mesh_dim_names=("replicate",)
        )
        rank = dist.get_rank(self._communication_group)

        # The cost is that of what is sent: blocks in the communication dtype.
        dtype = self._config.communication_dtype
        sent = [
            torch.empty(block.shape, dtype=dtype, device="meta")
            for block in self._global_blocked_params
        ]
        owners = assign_owners(sent, size, self._config.load_balancing_config.cost_model)
        self._allocate_buffers(sent, owners, rank, size)
        selector = tuple(owner == rank for owner in owners)
        self._local_buffers = tuple(compress(self._global_buffers, selector))
        return selector

    # ------------------------------------------------------------------------------ helpers

    def _group_size(self, num_replicas: int) -> int:
        size = self._config.num_trainers_per_group
        if size == -1:
            return num_replicas
        if size < 1 or num_replicas % size != 0:
            raise ValueError(
                f"Invalid num_trainers_per_group={size}: must be -1 or a divisor of the number of "
                f"replicas, {num_replicas}."
            )
        return size

    def _allocate_buffers(
        self, sent: Sequence[Tensor], owners: Sequence[int], rank: int, size: int
    ) -> None:
        """One buffer for all processes, in equal parts, with a view for every block."""
        # Blocks start at multiples of 64 bytes, for the sake of vectorised copies. Behind them each
        # process has a flag: whether it failed.
        aligned = AlignedMemoryCostModel()
        lengths = [int(aligned.cost(block)) // block.element_size() for block in sent]
        totals = [sum(compress(lengths, (o == r for o in owners))) for r in range(size)]
        dtype = self._config.communication_dtype
        device = self._param_group[keys.PARAMS][0].device
        width = max(totals) + aligned.alignment_bytes // dtype.itemsize
        self._global_buffer = torch.zeros(size, width, dtype=dtype, device=device)
        self._flags = self._global_buffer[:, max(totals)]
        self._local_buffer = self._global_buffer[rank]
        views: list[Tensor] = list(sent)
        for owner in range(size):
            own = [index for index, o in enumerate(owners) if o == owner]
            starts = accumulate((lengths[index] for index in own), initial=0)
            for index, start in zip(own, starts, strict=False):
                row = self._global_buffer[owner]
                views[index] = row[start : start + sent[index].numel()].view(sent[index].shape)
        self._global_buffers = tuple(views)

    def _gather(self) -> dist.Work | None:
        if not self._global_blocked_params:
            return None
        work: dist.Work | None = _all_gather(
            self._global_buffer.view(-1),
            self._local_buffer,
            group=self._communication_group,
            async_op=True,
        )
        return work

    @torch.no_grad()
    def _land(
        self, work: dist.Work | None, receive: Callable[[], None], error: Exception | None
    ) -> None:
        """Updates the parameters by what has been gathered."""
        if work is not None:
            work.wait()
        receive()
        self._write_back()
        self._share(error)

    def _share(self, error: Exception | None) -> None:
        """Raises on all processes what one of them was given."""
        if self._flags.device.type == "cpu" or self._is_refreshing():
            failed = self._flags.nonzero().flatten().tolist()
            if failed:
                self._flags.zero_()
                if error is None:
                    ranks = dist.get_process_group_ranks(self._communication_group)
                    raise RuntimeError(
                        f"The optimizer's step failed on rank {ranks[failed[0]]}, so it ends here "
                        "too; see that rank's error. Blocks of other ranks are already updated."
                    )
        if error is not None:
            raise error

    def agree(self, error: Exception | None) -> None:
        """Tells all replicas of an error that was noticed after the step; all must call this.

        Only where inverse roots are due on an accelerator, as there it may be noticed late.

        Args:
            error: This process's, or None.

        Raises:
            RuntimeError: If another process has one.
        """
        if not self.is_late():
            return
        flag = torch.tensor(float(error is not None), device=self._flags.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.replicas)
        if error is None and flag.item() > 0.0:
            raise RuntimeError(
                "The optimizer's step failed on another rank, so it ends here too; see the errors of "
                "the others."
            )

    def is_late(self) -> bool:
        """Whether errors of this step may be noticed after it."""
        return self._flags.device.type != "cpu" and self._is_refreshing()

    def _is_refreshing(self) -> bool:
        return self.step is not None and is_refresh_due(self._param_group, int(self.step.item()))

    def _receive_sums(self) -> None:
        if self._global_blocked_params:
            torch._foreach_add_(self._global_blocked_params, self._global_buffers)

    def _receive(self, selector: tuple[bool, ...] | None) -> None:
        params, buffers = self._global_blocked_params, self._global_buffers
        if selector is not None:
            params = tuple(compress(params, selector))
            buffers = tuple(compress(buffers, selector))
        if params:
            torch._foreach_copy_(params, buffers)


class HybridShardDistributor(DDPDistributor):
    """Blocks of local shards, each with one owner among the replicas of that shard (HSDP2).

    Args:
        *args: As for Distributor; the group's distributed config is a HybridShardDistributedConfig.
        **kwargs: Likewise.

    Raises:
        ValueError: If the mesh is not 2D, if it cannot be cut into groups of
            num_trainers_per_group replicas, or if a parameter is placed otherwise.
    """

    @property
    def _config(self) -> HybridShardDistributedConfig:
        config: HybridShardDistributedConfig = self._param_group[keys.DISTRIBUTED_CONFIG]
        return config

    def is_foreign_block(self, param: Tensor, key: str) -> bool:
        """Whether a key of the state is a block of another process, of this shard or another."""
        return is_foreign_shard(key, self._shard_rank()) or super().is_foreign_block(param, key)

    def _select_params(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        if self._config.device_mesh.ndim != 2:
            raise ValueError(
                f"Invalid device_mesh={self._config.device_mesh}: must have two dimensions, "
                "(replicate, shard)."
            )
        return select_shards(params, (Replicate, Shard), "HybridShardDistributedConfig")

    def groups_to_gather_over(self) -> list[dist.ProcessGroup]:
        """As under DDP, then over the shards."""
        return [self._communication_group, self._config.device_mesh.get_group(1)]

    def _find_replicas(self) -> dist.ProcessGroup:
        return self._config.device_mesh.get_group(0)

    def _shard_rank(self) -> int:
        return self._config.device_mesh.get_local_rank(1)

    def _block_key(self, block_index: int) -> str:
        return f"rank_{self._shard_rank()}-block_{block_index}"


def select_shards(
    params: Sequence[Tensor], expected: tuple[type, ...], config_name: str
) -> Iterator[Tensor]:
    """The parameters of which this process has a part.

    Args:
        params: The group's parameters.
        expected: How every parameter must be placed, by dimension of its mesh.
        config_name: The config, for messages.

    Yields:
        Those with a local shard that is not empty.

    Raises:
        ValueError: If a parameter is placed otherwise.
    """
    names = ", ".join(kind.__name__ for kind in expected)
    for param in params:
        placements = param.placements if is_dtensor(param) else ()
        # By exact type: a shard of a tensor-parallel shard is a subclass of Shard.
        if tuple(type(placement) for placement in placements) != expected:
            placed = f"a DTensor placed {placements}" if placements else "a plain tensor"
            raise ValueError(
                f"A parameter of shape {tuple(param.shape)} is {placed}, but {config_name} needs "
                f"parameters placed ({names}) by fully_shard; tensor-parallel parameters are not "
                "supported."
            )
        if local_tensor(param).numel() > 0:
            yield param


def is_foreign_shard(key: str, rank: int) -> bool:
    """Whether a key of the state is a block of another rank's shard."""
    match = re.fullmatch(r"rank_(\d+)-block_\d+", key)
    return match is not None and int(match[1]) != rank
