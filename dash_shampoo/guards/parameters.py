"""Which tensors can be trained: checked at construction, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import SingleDeviceDistributedConfig

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def names_of(group: Mapping[str, Any], group_index: int) -> list[str]:
    """For each parameter of a group a name for messages."""
    given = group.get("param_names", ())
    params = group["params"]
    if len(given) == len(params):
        return [f"{name!r}" for name in given]
    return [f"{index} of parameter group {group_index}" for index in range(len(params))]


def check_params(params: object) -> None:
    """Refuses what is no list of parameters, or has no order.

    Raises:
        TypeError: Saying what it is, and what to give.
    """
    kind = type(params).__name__
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"params is the module {kind}: give its parameters, model.parameters().")
    if isinstance(params, Mapping):
        raise TypeError(f"params is a {kind}: a parameter group stands in a list, [{{...}}].")
    if isinstance(params, set | frozenset):
        raise TypeError(f"params is a {kind}, which has no order to save a state by: give a list.")


def check_parameter(param: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Refuses what Shampoo can't train.

    Args:
        param: The parameter.
        name: For the message.
        group: Its group.

    Raises:
        TypeError: If its dtype is not a real floating-point one.
        ValueError: If it is lazy, nested, sparse, expanded, on the meta device, or a DTensor under a
            config for plain tensors.
    """
    if param.is_nested:
        raise ValueError(
            f"Parameter {name} is a nested tensor: give its parts, which have shapes of their own."
        )
    if torch.nn.parameter.is_lazy(param):
        raise ValueError(
            f"Parameter {name} is lazy and has no shape yet: run the model once on a batch before "
            "the optimizer is constructed."
        )
    what = f"Parameter {name} of shape {tuple(param.shape)}"
    if param.layout != torch.strided:
        raise ValueError(
            f"{what} has the layout {param.layout}: Shampoo needs dense parameters; give the others to "
            "an optimizer such as torch.optim.SparseAdam."
        )
    if param.dtype.is_complex:
        raise TypeError(
            f"{what} is complex ({param.dtype}): train its real view instead, a parameter of "
            "torch.view_as_real(...)."
        )
    if param.dtype not in _DTYPES and (param.requires_grad or not param.dtype.is_floating_point):
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"{what} has dtype {param.dtype}: must be one of {allowed}. Leave out what is not trained: "
            "[p for p in model.parameters() if p.requires_grad]."
        )
    if param.is_meta and param.requires_grad:
        raise ValueError(
            f"{what} is on the meta device and has no memory: materialise the model first, with "
            "model.to_empty(device=...) and its initialisation or checkpoint."
        )
    if param.requires_grad and any(
        step == 0 and size > 1 for step, size in zip(param.stride(), param.shape, strict=True)
    ):
        raise ValueError(
            f"{what} is expanded, several of its elements lie in one place: train what it was expanded "
            "from, or its clone()."
        )
    is_plain = type(group["distributed_config"]) is SingleDeviceDistributedConfig
    if is_plain and hasattr(param, "to_local"):
        raise ValueError(
            f"{what} is a DTensor, and distributed_config=SingleDeviceDistributedConfig needs plain "
            "tensors: use FullyShardDistributedConfig for fully_shard, HybridShardDistributedConfig for "
            "fully_shard on a 2D mesh, DDPDistributedConfig for replicate."
        )
