"""Replicated parameters whose blocks are spread over processes: owners, their state, one all-gather.

A *replica group* holds the same parameters. It is cut into groups of `num_trainers_per_group` processes;
within each, every block has one owner, which keeps its state and computes its update.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dash_shampoo.base.embedded import replicas
from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.distributed_configs import AlignedMemoryCostModel, assign_owners
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.dtensors import local_tensor
from dash_shampoo.base.embedded.flight import Flight
from dash_shampoo.base.embedded.group_state import is_refresh_due
from dash_shampoo.base.embedded.matrix_function_configs import check

logger = logging.getLogger(__name__)

# Renamed in torch 2.13, where the old name warns.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(kw_only=True, eq=False)
class DTensorBlockInfo(BlockInfo):
    """A block whose state consists of DTensors, replicated over the processes that own it.

    Attributes:
        mesh: The owners: one process of every group that the replicas are cut into.
    """

    mesh: DeviceMesh

    def allocate_zeros_tensor(
        self, size: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Zeros for the optimizer's state, as a DTensor."""
        local = super().allocate_zeros_tensor(size, dtype, device)
        tensor: Tensor = DTensor.from_local(local, self.mesh, [Replicate()], run_check=False)
        return tensor

    def get_tensor(self, tensor: Tensor) -> Tensor:
        """The local tensor itself; outside of `no_grad`, torch would return a view."""
        with torch.no_grad():
            return local_tensor(tensor)


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
    _needs = "replicated parameters"
    flight: Flight
    _error: Exception | None = None
    _is_to_be_compared: bool

    @torch.no_grad()
    def merge_and_block_gradients(self) -> Sequence[Tensor]:
        """As the base class; the first time, all processes compare their parameters."""
        if self._is_to_be_compared:
            self._is_to_be_compared = False
            params = [cut.param for cut in self._cuts]
            if (rank := replicas.first_that_differs(params, self.replicas)) is not None:
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
        selector = None
        if self._config.communicate_params:
            if params:
                torch._foreach_add_(params, directions)
            if self._local_buffers:
                torch._foreach_copy_(self._local_buffers, self.local_blocked_params)
            if use_masked_tensors:
                selector = self._global_grad_selector
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
        self.flight.take_off(partial(self._land, self._gather(), selector, error))

    def is_foreign_block(self, param: Tensor, key: str) -> bool:
        """Whether a key of the state is a block of the parameter that another process owns."""
        num_blocks = sum(len(cut.blocks) for cut in self._cuts if cut.param is param)
        return key in map(self._block_key, range(num_blocks))

    # ------------------------------------------------------- what other distributors override

    def _takes(self, placements: tuple[Any, ...]) -> bool:
        return all(placement.is_replicate() for placement in placements)

    def _find_replicas(self) -> dist.ProcessGroup:
        """The processes that hold the same parameters as this one."""
        return replicas.replicas_of(self._config)

    def _assign_blocks(self) -> tuple[bool, ...]:
        self.replicas = self._find_replicas()
        self.flight = Flight()
        cuts = self._cuts
        self._is_to_be_compared = replicas.check_same_parameters(
            [cut.param for cut in cuts], list(map(self._name_of, cuts)), self.replicas
        )

        ranks = dist.get_process_group_ranks(self.replicas)
        size, num_replicas = self._config.num_trainers_per_group, len(ranks)
        is_divisor = size == -1 or (size >= 1 and num_replicas % size == 0)
        allowed = f"-1 or a divisor of the number of replicas, {num_replicas}"
        check(is_divisor, "num_trainers_per_group", size, allowed)
        if size == -1:
            size = num_replicas
        row, column = divmod(ranks.index(dist.get_rank()), size)
        self._communication_group = replicas.group_of(ranks[row * size :][:size], self.replicas)
        # Those that own the same blocks, as state tensors are replicated over them.
        device_type = self._param_group["params"][0].device.type
        owners_of_same = replicas.group_of(ranks[column::size], self.replicas)
        mesh = DeviceMesh.from_group(owners_of_same, device_type, mesh_dim_names=("replicate",))
        self._block_info = partial(DTensorBlockInfo, mesh=mesh)
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

    def _allocate_buffers(
        self, sent: Sequence[Tensor], owners: Sequence[int], rank: int, size: int
    ) -> None:
        """One buffer for all processes, in equal parts, with a view for every block."""
        # Blocks start at multiples of 64 bytes, for the sake of vectorised copies. Behind them each
        # process has a flag: whether it failed.
        aligned = AlignedMemoryCostModel()
        dtype = self._config.communication_dtype
        lengths, starts = [0] * size, []
        for block, owner in zip(sent, owners, strict=True):
            starts.append(lengths[owner])
            lengths[owner] += int(aligned.cost(block)) // dtype.itemsize
        width = max(lengths) + aligned.alignment_bytes // dtype.itemsize
        device = self._param_group["params"][0].device
        self._global_buffer = torch.zeros(size, width, dtype=dtype, device=device)
        self._flags = self._global_buffer[:, max(lengths)]
        self._local_buffer = self._global_buffer[rank]
        self._global_buffers: tuple[Tensor, ...] = tuple(
            self._global_buffer[owner, start : start + block.numel()].view(block.shape)
            for block, owner, start in zip(sent, owners, starts, strict=True)
        )

    def _gather(self) -> dist.Work | None:
        if not self._global_blocked_params:
            return None
        buffer, group = self._global_buffer.view(-1), self._communication_group
        work: dist.Work | None = _all_gather(buffer, self._local_buffer, group=group, async_op=True)
        return work

    @torch.no_grad()
    def _land(
        self, work: dist.Work | None, selector: tuple[bool, ...] | None, error: Exception | None
    ) -> None:
        """Updates the parameters, or those that are selected, by what has been gathered."""
        if work is not None:
            work.wait()
        params, buffers = self._global_blocked_params, self._global_buffers
        if selector is not None:
            params, buffers = tuple(compress(params, selector)), tuple(compress(buffers, selector))
        if params:
            take = torch._foreach_copy_ if self._config.communicate_params else torch._foreach_add_
            take(params, buffers)
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
