"""Checkpoints that go over between Meta's package, the embedded base and DashShampoo.

The state is the same everywhere: keys, shapes and dtypes. What differs are the classes of the configs
that Distributed Shampoo keeps in its parameter groups, and so in every checkpoint; here they are found
by name, so that a checkpoint can be read where the package that wrote it is not installed. They are
registered when this module is imported: ``torch.load(..., weights_only=True)``, as every training
framework calls it, reads them without further ado.
"""

from __future__ import annotations

import copy
import enum
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dash_shampoo import (
    base,
    config,
    distribution,
    eigenbasis,
    inverse_root,
    orthogonalization,
    preconditioners,
)

logger = logging.getLogger(__name__)

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

    They are registered already where `dash_shampoo` has been imported. Where the list was cleared, give
    them to `torch.serialization.add_safe_globals`; torch's context `safe_globals` takes them off the list
    at its end.

    Checkpoints of Meta's package and of either base can be read with them: every config becomes the
    class of the same name of the base in use, so that the other package need not be installed. A
    checkpoint read this way can be loaded into `DashShampoo` and `DistributedShampoo`, and saved again
    in the classes of the base in use.

    Returns:
        Classes, and pairs of a class and the name that stands for it in the file.

    Note:
        Configs that hold functions (spectral and sign descent) need ``weights_only=False``. Where
        other tools read the file, such as ``torch.distributed.checkpoint``, leave the configs out of
        the groups that they save: `DashShampoo` then keeps those that it was constructed with.

    Examples:
        >>> import io
        >>> import torch
        >>> import dash_shampoo as ds
        >>> optimizer = ds.DashShampoo(torch.nn.Linear(8, 4).parameters())
        >>> file = io.BytesIO()
        >>> torch.save(optimizer.state_dict(), file)
        >>> _ = file.seek(0)
        >>> optimizer.load_state_dict(torch.load(file, weights_only=True))
    """
    named = _config_classes(base).items()
    aliases = [(cls, f"{home}.{name}") for home in _HOMES for name, cls in named]
    scales: list[Any] = [orthogonalization.match_rms_adamw, orthogonalization.muon_original]
    return [*_own_classes().values(), *scales, *aliases]


def _own_classes() -> dict[str, type]:
    """The configs of our own, by name."""
    rooms = (config, distribution, eigenbasis, inverse_root, orthogonalization, preconditioners)
    return {
        name: cls
        for room in rooms
        for name, cls in _config_classes(room).items()
        if name.endswith(("Config", "Scaling"))
    }


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
    # Another number of groups is refused later.
    present = [*param_groups, *({} for _ in saved_groups)]
    return [
        {**now, **{key: _native(key, value, now) for key, value in saved.items()}}
        for saved, now in zip(saved_groups, present, strict=False)
    ]


def _native(key: str, value: Any, group: Mapping[str, Any]) -> Any:
    """A saved value of a group as this base's config, where it is one in whatever form."""
    if isinstance(value, ExportedConfig):
        value = value.config
    if isinstance(value, str) and key.endswith(("_config", "_type")):
        try:
            return _decoded(json.loads(value))
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s of the checkpoint can't be read: it stays as it is.", key)
            return group.get(key)
    return base.native_config(value)


class ExportedConfig(str):
    """A config in an exported parameter group: a string to tools, the config to whoever loads it.

    ``torch.distributed.checkpoint`` and others take plain values only, Distributed Shampoo wants its
    configs back. So the value *is* a string (JSON, from which the config can be built again), and
    becomes the config where it is copied or pickled: a file holds what it held without this, and
    ``Optimizer.load_state_dict``, which copies the groups, gives configs to Meta's class too.

    Attributes:
        config: The config.
    """

    config: Any

    def __new__(cls, config: Any) -> ExportedConfig:
        """The string of a config."""
        # Named as the config's class, for whoever prints the type.
        named = type(type(config).__name__, (cls,), {})
        self: ExportedConfig = str.__new__(named, json.dumps(_encoded(config)))
        self.config = config
        return self

    # Pickle asks for the class of what it rebuilds, and `isinstance` is true for both.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The config's class."""
        return type(self.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.config.__reduce_ex__(protocol)

    def __copy__(self) -> Any:
        return self.config

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.config, memo)

    def __eq__(self, other: object) -> bool:
        if type(other) is str:
            return str.__eq__(self, other)
        return bool(self.config == getattr(other, "config", other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def exported_groups(
    param_groups: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[Tensor, int]]:
    """Parameter groups for a state dict.

    Args:
        param_groups: The optimizer's groups.

    Returns:
        The groups with plain values only, and the number of each parameter, as torch counts them.
    """
    groups: list[dict[str, Any]] = []
    numbers: dict[Tensor, int] = {}
    start = 0
    for group in param_groups:
        for position, param in enumerate(group["params"], start):
            numbers.setdefault(param, position)
        start += len(group["params"])
        exported = {
            key: ExportedConfig(value) if _is_config(value) else _plain(value)
            for key, value in group.items()
            if key != "params"
        }
        groups.append({**exported, "params": [numbers[param] for param in group["params"]]})
    return groups, numbers


def _plain(value: Any) -> Any:
    """Numbers of other libraries (NumPy's scalars) as Python's, which every reader of a file knows."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value)) if type(value) in (tuple, list) else value
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_config(value: Any) -> bool:
    return isinstance(value, enum.Enum) or (is_dataclass(value) and not isinstance(value, type))


def _encoded(value: Any) -> Any:
    """A config as what JSON can hold; what it can't is only named."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return {"type": type(value).__name__, "name": value.name}
    if isinstance(value, torch.dtype):
        return {"type": "dtype", "name": str(value).removeprefix("torch.")}
    if _is_config(value):
        named = {f.name: _encoded(getattr(value, f.name, None)) for f in fields(value) if f.init}
        return {"type": type(value).__name__, "fields": named}
    if isinstance(value, (list, tuple)):
        return {"type": type(value).__name__, "items": [_encoded(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(k, (int, str, float)) for k in value):
        return {"type": "dict", "items": [[k, _encoded(v)] for k, v in value.items()]}
    return {"type": type(value).__name__, "unreadable": True}


def _decoded(value: Any) -> Any:
    """The inverse of `_encoded`, with the classes of the base in use.

    Raises:
        KeyError: If a class is not known, or a value was only named.
    """
    if not isinstance(value, dict):
        return value
    kind = value["type"]
    if "items" in value:
        items = value["items"]
        if kind == "dict":
            return {key: _decoded(item) for key, item in items}
        return {"list": list, "tuple": tuple}[kind](_decoded(item) for item in items)
    if kind == "dtype":
        return getattr(torch, value["name"])
    cls: Any = {**_own_classes(), **_config_classes(base)}[kind]
    if issubclass(cls, enum.Enum):
        return cls[value["name"]]
    return cls(**{name: _decoded(item) for name, item in value["fields"].items()})


def _config_classes(module: ModuleType) -> dict[str, type]:
    """The dataclasses and enums that a module has, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and (is_dataclass(value) or issubclass(value, enum.Enum))
    }


torch.serialization.add_safe_globals([*safe_globals()])
