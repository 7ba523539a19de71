"""Many processes: which of them are replicas, and an error of one that reaches all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

import torch

from dash_shampoo.base import (
    DISTRIBUTOR,
    DDPDistributedConfig,
    DistributedConfig,
    DistributedShampoo,
    Flight,
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
        return {
            **vars(self),
            "replicas": None,
        }  # nor pickled; a load keeps the constructor's config


class ManyProcesses(DistributedShampoo):
    """The base's class, with our own distributors on both bases: a part of DashShampoo.

    In torch's `Join([ddp_model, optimizer])` the first rank without a batch ends the step on all ranks
    with an error: the blocks that it owns need gradients, which DDP does not leave there.
    """

    def join_hook(self, **kwargs: Any) -> Any:
        """For torch's Join context."""
        from torch.distributed.algorithms.join import JoinHook

        class EndsForAll(JoinHook):
            def main_hook(self) -> None:
                optimizer._end_for_all()

        optimizer = self
        return EndsForAll()

    @property
    def join_device(self) -> torch.device:
        """The device of the parameters, for torch's Join context."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The replicas, for torch's Join context."""
        return getattr(self._first_distributor(), "replicas", None)

    def _end_for_all(self) -> None:
        rank = torch.distributed.get_rank()
        distributor = self._first_distributor()
        error = RuntimeError(
            f"Rank {rank} has no more batches while others still step, and the blocks that it owns need "
            "its gradients: give all ranks equally many batches (DistributedSampler does), or stop all "
            "with Join(..., throw_on_early_termination=True)."
        )
        distributor.update_params(distributor.substitute(error))

    def _first_distributor(self) -> Any:
        return self._per_group_state_lists[0][DISTRIBUTOR]

    def _select_distributor_class(self, distributed_config: DistributedConfig) -> Any:
        if type(distributed_config) is DashDDPDistributedConfig:
            return own_distributor_class(DDPDistributedConfig())
        own = own_distributor_class(distributed_config)
        return own or super()._select_distributor_class(distributed_config)

    @cached_property
    def _flight(self) -> Flight:
        return Flight()

    def _group_step_body(self, state_lists: Any, *args: Any) -> None:
        """As the base's; what a group sends to other processes arrives while the next one computes."""
        take_weights(state_lists)
        if getattr(state_lists[DISTRIBUTOR], "is_shared", False):
            state_lists[DISTRIBUTOR].flight = self._flight
        with self._flight.over_group(is_last=state_lists is self._per_group_state_lists[-1]):
            super()._group_step_body(state_lists, *args)


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


def share_late_error(groups: Iterable[Any], error: Exception | None) -> None:
    """Raises what was noticed after the step, on all processes.

    Args:
        groups: The lists of each parameter group.
        error: This process's error, or None.

    Raises:
        Exception: The error, or one that tells of another process's.
    """
    distributors = [state_lists[DISTRIBUTOR] for state_lists in groups]
    late = (d for d in distributors if getattr(d, "is_shared", False) and d.is_late())
    # Once: who raises here takes no part in what comes after it.
    if (distributor := next(late, None)) is not None:
        distributor.agree(error)
    if error is not None:
        raise error
