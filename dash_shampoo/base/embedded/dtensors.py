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
