"""Where a block belongs, and how its state is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class BlockInfo:
    """Where a block belongs and how its state is allocated, by the lists of either base.

    Attributes:
        param: The parameter that contains the block.
        composable_block_ids: Index of the parameter in its group, key of the block in the state.
        param_name: Name of the parameter, where the group has names. (Default: None)
    """

    param: Tensor
    composable_block_ids: tuple[int, str]
    param_name: str | None = None

    def allocate_zeros_tensor(
        self, size: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Zeros for the optimizer's state."""
        return torch.zeros(tuple(size), dtype=dtype, device=device)

    def allocate_ones_tensor(
        self, size: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Ones for the optimizer's state."""
        tensor = self.allocate_zeros_tensor(size, dtype, device)
        self.get_tensor(tensor).fill_(1.0)
        return tensor

    def allocate_eye_tensor(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An identity for the optimizer's state."""
        tensor = self.allocate_zeros_tensor((n, n), dtype, device)
        self.get_tensor(tensor).fill_diagonal_(1.0)
        return tensor

    def get_tensor(self, tensor: Tensor) -> Tensor:
        """The local tensor of an allocated one."""
        return tensor

    def block_state(self, state: Mapping[Tensor, Any]) -> dict[str, Any]:
        """The block's part of the optimizer's state."""
        block_state: dict[str, Any] = state[self.param][self.composable_block_ids[1]]
        return block_state

    def add_zeros_like(self, block: Tensor, state: Mapping[Tensor, Any], key: str) -> Tensor:
        """Adds zeros of the block's shape and dtype to its part of the state; the local tensor."""
        tensor = self.allocate_zeros_tensor(block.shape, block.dtype, block.device)
        self.block_state(state)[key] = tensor
        return self.get_tensor(tensor)
