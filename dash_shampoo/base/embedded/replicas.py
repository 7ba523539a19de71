"""Processes that hold the same parameters: their process groups, and whether they really do."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakTensorKeyDictionary

from dash_shampoo.base.embedded.dtensors import local_tensor
from dash_shampoo.base.embedded.matrix_function_configs import check

# One group for all parameter groups and optimizers, by the group of all processes: another one means
# that torch.distributed was initialized anew.
_groups: WeakKeyDictionary[
    dist.ProcessGroup, WeakValueDictionary[tuple[int, ...], dist.ProcessGroup]
] = WeakKeyDictionary()
# Local shapes of parameters that were found equal.
_compared: Any = WeakTensorKeyDictionary()
_MAX_NAMED = 3


def group_of(ranks: Sequence[int], given: dist.ProcessGroup) -> dist.ProcessGroup:
    """A process group of these ranks, made at most once; all of them must call this.

    Args:
        ranks: Global ranks.
        given: A group to be used if it has these very ranks.
    """
    key, world = tuple(sorted(ranks)), dist.group.WORLD
    assert world is not None
    groups = _groups.setdefault(world, WeakValueDictionary())
    for known in (given, world, groups.get(key)):
        if known is not None and tuple(sorted(dist.get_process_group_ranks(known))) == key:
            return known
    # Only the members: ranks outside may be other stages of a pipeline, with other optimizers.
    group: dist.ProcessGroup = dist.new_group(list(key), use_local_synchronization=True)
    groups[key] = group
    return group


def replicas_of(config: Any) -> dist.ProcessGroup:
    """The replicas that a config names by a process group or a mesh; all processes if none.

    Raises:
        RuntimeError: If torch.distributed is not initialized.
        ValueError: If a mesh has more than one dimension.
    """
    if not dist.is_initialized():
        raise RuntimeError("Distributed configs need torch.distributed to be initialized.")
    given: dist.ProcessGroup | DeviceMesh | None = getattr(config, "replicas", None)
    replicas = given or dist.group.WORLD
    assert replicas is not None
    if isinstance(replicas, DeviceMesh):
        allowed = (
            "a mesh of one dimension, the one along which the parameters are replicated, such as "
            "mesh['dp']"
        )
        check(replicas.ndim == 1, "replicas", replicas, allowed)
        return replicas.get_group()
    return replicas


def check_same_parameters(
    params: Sequence[Tensor], names: Sequence[str], group: dist.ProcessGroup
) -> bool:
    """Refuses ranks that are taken for replicas and have other parameters; all ranks must call this.

    Args:
        params: The parameters of a parameter group.
        names: Their names, for the message.
        group: The replicas.

    Returns:
        Whether they are new: those that were compared before are not again, as one process alone may
        have to construct its distributor anew.

    Raises:
        ValueError: On every rank, naming the first differences.
    """
    shapes_now = [tuple(local_tensor(param).shape) for param in params]
    if [_compared.get(param) for param in params] == shapes_now:
        return False
    own = [
        (name, shape, str(param.dtype))
        for name, shape, param in zip(names, shapes_now, params, strict=True)
    ]
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    first = everyones[0]
    for rank, other in zip(ranks, everyones, strict=True):
        what = [f"{len(other)} parameters instead of {len(first)}"]
        if len(other) == len(first):
            what = [
                f"{name} of shape {shape} ({dtype}) instead of {wanted[1]} ({wanted[2]})"
                for (name, shape, dtype), wanted in zip(other, first, strict=True)
                if (shape, dtype) != wanted[1:]
            ]
        if what:
            raise ValueError(
                f"Rank {rank} is taken for a replica of rank {ranks[0]}, but has other parameters: "
                f"{'; '.join(what[:_MAX_NAMED])}. Give DashDDPDistributedConfig(replicas=...) the mesh "
                "dimension or process group along which the parameters are replicated, and every rank "
                "the same parameter groups."
            )
    for param, shape in zip(params, shapes_now, strict=True):
        _compared[param] = shape
    return True


def first_that_differs(params: Sequence[Tensor], group: dist.ProcessGroup) -> int | None:
    """The first rank whose values are not those of the group's first rank; all must call this.

    Args:
        params: The parameters.
        group: The replicas.

    Returns:
        A global rank, or None. Compared is the sum of each parameter.
    """
    if not params:
        return None
    sums = torch.stack([local_tensor(p).detach().sum(dtype=torch.float64) for p in params])
    sums = sums.nan_to_num(nan=0.0)  # NaN equals NaN here
    everyones = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, sums, group=group)
    ranks = dist.get_process_group_ranks(group)
    values_of_ranks = zip(ranks, everyones, strict=True)
    return next((r for r, values in values_of_ranks if not torch.equal(values, everyones[0])), None)
