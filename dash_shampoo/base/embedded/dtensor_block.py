"""A block whose state is replicated over processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.dtensors import local_tensor


@dataclass(kw_only=True, eq=False)
class DTensorBlockInfo(BlockInfo):
    """A block whose state consists of DTensors on the processes that own it.

    Attributes:
        mesh: The owners: one process of every group that the replicas are cut into.
    """

    mesh: DeviceMesh

    def allocate_zeros_tensor(
        self, size: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Zeros for the optimizer's state, as a DTensor."""
        local = torch.zeros(tuple(size), dtype=dtype, device=device)
        tensor: Tensor = DTensor.from_local(local, self.mesh, [Replicate()], run_check=False)
        return tensor

    def get_tensor(self, tensor: Tensor) -> Tensor:
        """The local tensor itself; outside of `no_grad`, torch would return a view."""
        with torch.no_grad():
            return local_tensor(tensor)
