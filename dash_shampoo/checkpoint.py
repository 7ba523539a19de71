"""Checkpoints that go over between Meta's package, the embedded base and DashShampoo.

The state is the same everywhere: keys, shapes and dtypes. What differs are the classes of the configs
that Distributed Shampoo keeps in its parameter groups, and so in every checkpoint; here they are found
by name, so that a checkpoint can be read where the package that wrote it is not installed.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Mapping, Sequence
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from dash_shampoo import base, config, eigenbasis, orthogonalization

# The modules by whose names the configs of either base stand in a pickle.
_HOMES = (
    "distributed_shampoo.shampoo_types",
    "distributed_shampoo.preconditioner.matrix_functions_types",
    "distributed_shampoo.utils.load_balancing_utils",
    "dash_shampoo.base.embedded.configs",
    "dash_shampoo.base.embedded.distributed_configs",
    "dash_shampoo.base.embedded.matrix_function_configs",
)


def safe_globals() -> list[type | tuple[type, str]]:
    """The config classes in a checkpoint, for ``torch.load(..., weights_only=True)``.

    Checkpoints of Meta's package and of either base can be read with them: every config becomes the
    class of the same name of the base in use, so that the other package need not be installed. A
    checkpoint read this way can be loaded into `DashShampoo` and `DistributedShampoo`, and saved again
    in the classes of the base in use.

    Returns:
        Classes, and pairs of a class and the name that stands for it in the file; an argument of
        `torch.serialization.safe_globals` or `add_safe_globals`.

    Note:
        Configs that hold functions (spectral and sign descent) need ``weights_only=False``. Where
        other tools read the file, such as ``torch.distributed.checkpoint``, leave the configs out of
        the groups that they save: `DashShampoo` then keeps those that it was constructed with.

    Example:
        >>> import io
        >>> import torch
        >>> import dash_shampoo as ds
        >>> optimizer = ds.DashShampoo(torch.nn.Linear(8, 4).parameters())
        >>> file = io.BytesIO()
        >>> torch.save(optimizer.state_dict(), file)
        >>> _ = file.seek(0)
        >>> with torch.serialization.safe_globals(ds.safe_globals()):
        ...     checkpoint = torch.load(file, weights_only=True)
        >>> optimizer.load_state_dict(checkpoint)
    """
    named = _config_classes(base).items()
    aliases = [(cls, f"{home}.{name}") for home in _HOMES for name, cls in named]
    ours = [
        cls
        for room in (config, eigenbasis, orthogonalization)
        for name, cls in _config_classes(room).items()
        if room is config or name.endswith("Config")
    ]
    scales: list[Any] = [orthogonalization.match_rms_adamw, orthogonalization.muon_original]
    return [*ours, *scales, *aliases]


def native_groups(
    saved_groups: Sequence[Mapping[str, Any]], param_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Saved parameter groups as the base in use needs them.

    Args:
        saved_groups: The groups of a state dict.
        param_groups: The optimizer's groups.

    Returns:
        New groups, whose configs are of the base's classes. What a saved group lacks is as it was.
    """
    # Another number of groups is for the base to refuse.
    present = [*param_groups, *({} for _ in saved_groups)]
    return [
        {**now, **{key: base.native_config(value) for key, value in saved.items()}}
        for saved, now in zip(saved_groups, present, strict=False)
    ]


def without_cast(
    cast: Mapping[Tensor, Any],
    saved: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    known: Container[Tensor],
) -> dict[Tensor, Any]:
    """The state of parameters as it was saved.

    `Optimizer.load_state_dict` casts floating-point state to the dtype of its parameter before the
    optimizer sees it: fp32 factor matrices of bf16 parameters would come back with 8 bits.

    Args:
        cast: What torch made of the state, by parameter.
        saved: The state dict that is being loaded.
        param_groups: The optimizer's groups, which have the parameters in the saved order.
        known: Parameters whose state exists, so that it is copied in place, to its dtype and device.

    Returns:
        `cast`, with the saved state for every known parameter.
    """
    ids = [identifier for group in saved["param_groups"] for identifier in group["params"]]
    params = [param for group in param_groups for param in group["params"]]
    exact = {
        param: saved["state"][identifier]
        for identifier, param in zip(ids, params, strict=True)
        if identifier in saved["state"] and param in known
    }
    return {**cast, **exact}


def _config_classes(module: ModuleType) -> dict[str, type]:
    """The dataclasses and enums that a module has, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and (is_dataclass(value) or issubclass(value, enum.Enum))
    }
