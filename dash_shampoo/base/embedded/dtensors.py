"""DTensors, without the import of what takes a second to import."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """The local part of a DTensor; a plain tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Where the local part of a DTensor begins in its first dimension; 0 of a plain tensor."""
    if not is_dtensor(tensor):
        return 0
    start, size = 0, tensor.shape[0]
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard(0):  # as `torch.chunk` cuts
            step = -(-size // tensor.device_mesh.size(dimension))
            offset = min(tensor.device_mesh.get_local_rank(dimension) * step, size)
            start, size = start + offset, min(step, size - offset)
    return start
