"""Checkpoints that go over between Meta's package, the embedded base and DashShampoo.

The state is the same everywhere: keys, shapes and dtypes. What differs are the classes of the configs
that Distributed Shampoo keeps in its parameter groups, and so in every checkpoint; here they are found
by name, so that a checkpoint can be read where the package that wrote it is not installed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dash_shampoo import base, config

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
        Configs that hold functions (spectral and sign descent) need ``weights_only=False``.

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
    return [*_config_classes(config).values(), *aliases]


def native_configs(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose groups hold the base's own config classes.

    Args:
        state_dict: An optimizer's state dict; configs of the other base are looked up by name.

    Returns:
        A new dict with new groups; the state itself is shared.
    """
    groups = [
        {key: base.native_config(value) for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


@torch.no_grad()
def restore_precision(
    param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any], saved: Mapping[str, Any]
) -> None:
    """Copies anew what `Optimizer.load_state_dict` rounded to the parameters' dtypes.

    torch casts floating-point state to the dtype of its parameter before the optimizer sees it: fp32
    factor matrices of bf16 parameters come back with 8 bits.

    Args:
        param_groups: The optimizer's groups.
        state: The optimizer's state, after loading; written in place.
        saved: The state dict that was loaded.
    """
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    for identifier, param in zip(ids, params, strict=True):
        if identifier in saved["state"]:
            _copy_where_rounded(state[param], saved["state"][identifier], param.dtype)


def _copy_where_rounded(current: Any, saved: Any, dtype: torch.dtype) -> None:
    if callable(getattr(current, "state_dict", None)):
        current = current.state_dict()
    if isinstance(current, Mapping) and isinstance(saved, Mapping):
        for key, value in current.items():
            # Tools that flatten a state turn the numbers of the factor matrices into strings.
            found = key if key in saved else str(key)
            if found in saved:
                _copy_where_rounded(value, saved[found], dtype)
    elif (
        isinstance(current, Tensor)
        and isinstance(saved, Tensor)
        and saved.is_floating_point()
        and saved.dtype != dtype
    ):
        current.copy_(saved)


def _config_classes(module: ModuleType) -> dict[str, type]:
    """The dataclasses and enums that a module has, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and (is_dataclass(value) or issubclass(value, enum.Enum))
    }
