"""Blocks of a parameter group: which there are, which are this process's, how they are updated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, count, islice
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.blocking import (
    BlockGrid,
    Grid,
    GridBlocks,
    equal_grids,
    multi_dim_split,
)
from dash_shampoo.base.embedded.configs import DefaultShampooRuntimeConfig, ShampooRuntimeConfig
from dash_shampoo.base.embedded.dtensors import first_row, is_dtensor, local_tensor
from dash_shampoo.base.embedded.parts import cut_by_rows


@dataclass(kw_only=True, eq=False)
class _Cut:
    """How a parameter and its gradient are cut, or a part of them.

    Attributes:
        param: The parameter.
        index: Its number in the group.
        rows: The rows that make the part; None for the whole.
        merged_shape: The shape with small dimensions merged.
        blocks: Views of the parameter.
        first_block: The number of the first of them among those of the parameter.
        grids: The blocks by grids of equal ones, each with its view of the parameter.
        local_selector: Which blocks are this process's.
        num_local: How many of them.
    """

    param: Tensor
    index: int
    rows: slice | None
    merged_shape: tuple[int, ...]
    blocks: tuple[Tensor, ...]
    first_block: int
    grids: tuple[tuple[Grid, Tensor], ...]
    local_selector: tuple[bool, ...] = ()
    num_local: int = 0


class Distributor:
    """Merges and blocks parameters and gradients; here one process owns all blocks.

    Distributors of several processes override the methods that start with an underscore and
    `update_params`.

    Args:
        param_group: The parameter group.
        runtime_config: Whether gradients are checked.

    Attributes:
        keeps_a_part: Whether other processes have state that this one lacks.
        is_shared: Whether other processes wait for this one's directions in `update_params`.
        gives_grids: Whether gradients are given as `GridBlocks`, for who can take them.
        local_blocked_params: The blocks of this process.
        local_block_info_list: What is known of each.
        local_grad_selector: Which of them have a gradient in this step.
        local_masked_blocked_params: Those that have.
        grids: The same by grids.
        step: The group's step count, once there is one.
    """

    keeps_a_part = False
    is_shared = False
    gives_grids = False
    grids: tuple[BlockGrid, ...]
    step: Tensor | None = None
    _needs = "plain tensors"
    _block_info: Callable[..., BlockInfo] = BlockInfo

    def __init__(
        self,
        param_group: dict[str, Any],
        runtime_config: ShampooRuntimeConfig = DefaultShampooRuntimeConfig,
    ) -> None:
        self._param_group = param_group
        self._runtime_config = runtime_config
        self._max_dim: int | float = param_group["max_preconditioner_dim"]
        self._config: Any = param_group["distributed_config"]
        params, names = param_group["params"], param_group.get("param_names", [])
        # Meta's package may split a group, and leaves each part the names of all.
        is_named = len(names) == len(params)
        self._names: dict[int, str] = (
            dict(zip(map(id, params), names, strict=True)) if is_named else {}
        )
        self._staged: list[tuple[Tensor, Tensor]] = []
        self._cuts = [
            cut
            for index, param in enumerate(self._select_params(params))
            for cut in self._cut_param(param, index)
        ]
        self._global_blocked_params = tuple(block for cut in self._cuts for block in cut.blocks)

        self._local_selector = self._assign_blocks()
        local_flags = iter(self._local_selector)
        for cut in self._cuts:
            cut.local_selector = tuple(islice(local_flags, len(cut.blocks)))
            cut.num_local = sum(cut.local_selector)
        self.local_blocked_params = tuple(
            compress(self._global_blocked_params, self._local_selector)
        )
        self.local_block_info_list = tuple(
            self._block_info(
                param=cut.param,
                composable_block_ids=(cut.index, self._block_key(number)),
                param_name=self._names.get(id(cut.param)),
            )
            for cut in self._cuts
            for number in compress(count(cut.first_block), cut.local_selector)
        )
        self._select_active((True,) * len(self._cuts))

    def is_foreign_block(self, param: Tensor, key: str) -> bool:
        """Whether a key of the parameter's state is a block that is kept by another process."""
        del param, key
        return False

    @torch.no_grad()
    def merge_and_block_gradients(self) -> Sequence[Tensor]:
        """The blocks of the gradients that are there; to be called once a step, before all else.

        Raises:
            AssertionError: With `eager_nan_check`, if a gradient is not finite.
            RuntimeError: If a gradient is sparse.
        """
        self.refresh_blocked_params()
        tensors: list[Tensor] = []
        active = []
        for cut in self._cuts:
            grad = cut.param.grad
            has_grad = grad is not None and local_tensor(grad).numel() > 0
            active.append(has_grad)
            if grad is None or not has_grad or not cut.num_local:
                continue
            grad = local_tensor(grad)
            self._check_gradient(grad, cut)
            grad = grad.to(cut.param.dtype)  # a parameter may ask for gradients of another
            if cut.rows is not None:
                grad = grad[cut.rows]
            if grad.shape != cut.merged_shape:
                grad = grad.reshape(cut.merged_shape)
            if self.gives_grids and cut.num_local == len(cut.blocks):
                tensors.extend(grid.of(grad) for grid, _ in cut.grids)
            else:
                blocks = multi_dim_split(grad, self._max_dim)
                tensors.extend(compress(blocks, cut.local_selector))
        if tuple(active) != self._active_params:
            self._select_active(tuple(active))
        return GridBlocks(self.grids, tensors) if self.gives_grids else tuple(tensors)

    @torch.no_grad()
    def update_params(
        self, blocked_search_directions: Sequence[Tensor], use_masked_tensors: bool = True
    ) -> None:
        """Adds the search directions to the blocks.

        Args:
            blocked_search_directions: One per block that has a gradient, or of all blocks.
            use_masked_tensors: Whether only the blocks with a gradient are updated.
        """
        directions = blocked_search_directions
        if isinstance(directions, GridBlocks):
            if directions.grids:
                torch._foreach_add_([grid.target for grid in directions.grids], directions.tensors)
        elif params := self._targets(directions, use_masked_tensors):
            torch._foreach_add_(params, tuple(directions))
        self._write_back()

    def substitute(self, error: Exception) -> tuple[Tensor, ...]:
        """Search directions in the place of those that could not be computed.

        Args:
            error: What went wrong.

        Returns:
            Nothing, for `update_params`, where other processes wait for this one's directions.

        Raises:
            Exception: The error, where nobody waits.
        """
        raise error

    @torch.no_grad()
    def refresh_blocked_params(self) -> None:
        """Reads parameters whose blocks cannot be views of them."""
        for param, copy in self._staged:
            copy.copy_(param)

    # ------------------------------------------------------- what other distributors override

    def _takes(self, placements: tuple[Any, ...]) -> bool:
        """Whether parameters may be placed so; () is a plain tensor's."""
        return not placements

    def _select_params(self, params: Sequence[Tensor]) -> Iterator[Tensor]:
        """The parameters that have blocks in this process."""
        for param in params:
            placements = param.placements if is_dtensor(param) else ()
            if not self._takes(placements):
                placed = f"a DTensor placed {placements}" if placements else "a plain tensor"
                raise ValueError(
                    f"A parameter of shape {tuple(param.shape)} is {placed}, but "
                    f"{type(self._config).__name__} needs {self._needs}. Use FullyShardDistributedConfig "
                    "for fully_shard, HybridShardDistributedConfig for fully_shard on a 2D mesh, "
                    "DDPDistributedConfig for replicate; tensor-parallel parameters are not supported."
                )
            yield param

    def _assign_blocks(self) -> tuple[bool, ...]:
        """Which blocks are this process's."""
        return (True,) * len(self._global_blocked_params)

    def _block_key(self, block_index: int) -> str:
        """The key of a block in the state of its parameter."""
        return f"block_{block_index}"

    def _select_active(self, active_params: tuple[bool, ...]) -> None:
        """Rebuilds what depends on which parameters have a gradient."""
        self._active_params = active_params
        self._global_grad_selector: tuple[bool, ...] = tuple(
            has_grad
            for cut, has_grad in zip(self._cuts, active_params, strict=True)
            for _ in cut.blocks
        )
        self.local_grad_selector = tuple(compress(self._global_grad_selector, self._local_selector))
        self.local_masked_blocked_params = tuple(
            compress(self.local_blocked_params, self.local_grad_selector)
        )
        self.grids = tuple(self._active_grids(active_params))

    # ------------------------------------------------------------------------------ helpers

    def _cut_param(self, param: Tensor, index: int) -> Iterator[_Cut]:
        """The cuts of a parameter, part by part."""
        local = local_tensor(param).detach()
        first_block = 0
        # Without parts nobody asks for the first row, nor its mesh for this process's place in it.
        first = first_row(param) if self._param_group.get("row_parts") is not None else 0
        for rows, part, shape in cut_by_rows(param.shape, local, first, self._param_group):
            try:
                merged = part.view(shape)
            except RuntimeError:
                # The memory format (channels last, say) does not allow merged dimensions: the blocks
                # are then views of a contiguous copy, read before and written back after a step.
                copy = part.clone(memory_format=torch.contiguous_format)
                self._staged.append((part, copy))
                merged = copy.view(shape)
            blocks = multi_dim_split(merged, self._max_dim)
            yield _Cut(
                param=param,
                index=index,
                rows=rows,
                merged_shape=shape,
                blocks=blocks,
                first_block=first_block,
                grids=tuple((grid, grid.of(merged)) for grid in equal_grids(shape, self._max_dim)),
            )
            first_block += len(blocks)

    def _active_grids(self, active_params: tuple[bool, ...]) -> Iterator[BlockGrid]:
        start = 0
        for cut in compress(self._cuts, active_params):
            if cut.num_local == len(cut.blocks):
                for grid, target in cut.grids:
                    yield BlockGrid(tuple(start + n for n in grid.numbers), grid.counts, target)
            else:  # blocks of other processes lie between
                for position in range(start, start + cut.num_local):
                    yield BlockGrid((position,), (), self.local_masked_blocked_params[position])
            start += cut.num_local

    def _name_of(self, cut: _Cut) -> str:
        return self._names.get(id(cut.param), f"parameter {cut.index}")

    def _check_gradient(self, grad: Tensor, cut: _Cut) -> None:
        named = f"parameter {cut.index} of its group, of shape {tuple(cut.param.shape)},"
        if grad.is_sparse:
            raise RuntimeError(f"The {named} has a sparse gradient: Shampoo needs dense ones.")
        if self._runtime_config.eager_nan_check and not torch.isfinite(grad).all():
            raise AssertionError(
                f"The gradient of {named} has NaN or infinite values: check the model's stability or "
                "clip the gradients."
            )

    def _targets(self, directions: Sequence[Tensor], use_masked: bool) -> tuple[Tensor, ...]:
        params = self.local_masked_blocked_params if use_masked else self.local_blocked_params
        if len(params) != len(directions):
            raise ValueError(f"Got {len(directions)} search directions for {len(params)} blocks.")
        return params

    def _write_back(self) -> None:
        for param, copy in self._staged:
            param.copy_(copy)
