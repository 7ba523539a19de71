"""Many processes: which of them are replicas, and an error of one that reaches all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from dash_shampoo.base import (
    DISTRIBUTOR,
    DDPDistributedConfig,
    own_distributor_class,
    take_weights,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(kw_only=True)
class DashDDPDistributedConfig(DDPDistributedConfig):
    """Replicated parameters where not every process is a replica: pipelines, experts, subgroups.

    Choose this instead of DDPDistributedConfig when parameters are replicated along one dimension of a
    mesh only.

    Attributes:
        replicas: The processes that hold the same parameters as this one: a mesh of one dimension, such
            as `mesh["dp"]`, or a process group; None means all. (Default: None)
    """

    replicas: DeviceMesh | ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DashDDPDistributedConfig:
        return self  # process groups cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "replicas": None}  # nor pickled; loading keeps the constructor's config


def distributor_class(config: Any) -> Any:
    """Our own distributor for a config, on both bases; None where only the base has one."""
    if type(config) is DashDDPDistributedConfig:
        return own_distributor_class(DDPDistributedConfig())
    return own_distributor_class(config)


def shares_errors(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an override of `_compute_search_directions`, so that an error reaches all processes.

    The others wait in `update_params` for this one's directions: our distributors tell them there, and
    all raise.
    """

    @wraps(compute)
    def directions(self: Any, state_lists: Any, step: torch.Tensor, **kwargs: Any) -> Any:
        distributor = state_lists[DISTRIBUTOR]
        if not getattr(distributor, "is_shared", False):
            return compute(self, state_lists=state_lists, step=step, **kwargs)
        distributor.step = step
        try:
            return compute(self, state_lists=state_lists, step=step, **kwargs)
        except Exception as error:
            return distributor.substitute(error)

    return directions


def take_weights_at_first(groups: Iterable[Any]) -> None:
    """Lets averaging begin at the weights of now where no step was taken yet.

    In the constructor, those of the first process may not have arrived at the others.

    Args:
        groups: The lists of each parameter group.
    """
    for state_lists in groups:
        if state_lists["step"].item() == 0:
            take_weights(state_lists)
