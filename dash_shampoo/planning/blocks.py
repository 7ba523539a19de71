"""What every block of a parameter is and stores, read off the base's own optimizer.

The base builds its real optimizer on parameters of the meta device: the same code merges and splits
them, chooses the preconditioned dimensions and roots, and allocates the state, but no memory is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dash_shampoo import base, preconditioners
from dash_shampoo.base import (
    DISTRIBUTOR,
    SHAMPOO_PRECONDITIONER_LIST,
    BaseShampooPreconditionerConfig,
    DefaultShampooConfig,
    DistributedShampoo,
    PreconditionerConfig,
    PreconditionerList,
    RootInvShampooPreconditionerConfig,
    SingleDeviceDistributedConfig,
    own_distributor_class,
)
from dash_shampoo.buckets.layout import BlockSpec
from dash_shampoo.config import base_class_of
from dash_shampoo.inverse_root import check_supported
from dash_shampoo.preconditioners import ScalarAdaGradPreconditionerConfig
from dash_shampoo.preconditioners.choice import config_for_base
from dash_shampoo.preconditioners.scalar import scalar_list
from dash_shampoo.preconditioners.seams import block_specs

_PARAMS = ("params", "param_names")
META = torch.device("meta")


@dataclass(frozen=True)
class ParameterSpec:
    """What a plan must know of a parameter.

    Attributes:
        shape: Its shape, or that of a local shard.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class BlockCost:
    """One block and its state.

    Attributes:
        spec: Shape, preconditioned dimensions, roots and dtype.
        state_bytes: Bytes of its state by the key in the optimizer's state ("factor_matrices", …).
    """

    spec: BlockSpec
    state_bytes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class GroupProfile:
    """The settings of a parameter group, and the blocks of every shape that occurs in it.

    Attributes:
        options: The group's options as the base completed them, with the preconditioner config as it was
            given.
        shared_bytes: Bytes of state that all parameters of the group share (the step count, …).
        blocks: The blocks of each parameter, in order.
    """

    options: Mapping[str, Any]
    shared_bytes: int
    blocks: Mapping[ParameterSpec, tuple[BlockCost, ...]]

    @property
    def shampoo(self) -> BaseShampooPreconditionerConfig | None:
        """The preconditioner config; None where a group has no factor matrices, as with Adam."""
        config = self.options["preconditioner_config"]
        return config if isinstance(config, BaseShampooPreconditionerConfig) else None


def read_groups(params: Iterable[Any]) -> list[tuple[list[ParameterSpec], dict[str, Any]]]:
    """Shapes and dtypes of the parameters, group by group.

    Args:
        params: What an optimizer takes: tensors, pairs (name, tensor), or dicts of groups. Only
            shapes and dtypes are looked at, so the tensors may lie on the meta device.

    Returns:
        For each group its parameters and its other options.

    Raises:
        ValueError: If there is no parameter.
    """
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    result = []
    for group in groups:
        members = group["params"]
        listed = [members] if isinstance(members, Tensor) else list(members)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
        if not tensors:
            raise ValueError("params has a group without parameters.")
        specs = [ParameterSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        result.append((specs, {key: value for key, value in group.items() if key not in _PARAMS}))
    return result


def profile_groups(
    shapes: Sequence[Iterable[ParameterSpec]],
    group_options: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> list[GroupProfile]:
    """Builds the base's optimizer on the meta device and reads off what it made.

    Args:
        shapes: For each group the (local) parameters that occur, each once.
        group_options: For each group the options that differ from `options`.
        options: Arguments of `DistributedShampoo`, apart from the parameters.

    Returns:
        One profile per group.

    Raises:
        ValueError: If an option is out of its range, the solver cannot do a root, or the
            preconditioner is neither one of inverse roots nor by elements.
        NotImplementedError: If the base lacks an option.
    """
    configs = [_preconditioner_config({**options, **own}) for own in group_options]
    distinct = [list(dict.fromkeys(group)) for group in shapes]
    groups = [
        {
            **own,
            "params": [
                nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device=META), False)
                for spec in specs
            ],
            # The solver leaves no trace in the state.
            "preconditioner_config": config_for_base(config),
            "distributed_config": _single_device({**options, **own}),
        }
        for specs, own, config in zip(distinct, group_options, configs, strict=True)
    ]
    optimizer = _Allocating(groups, **options)
    return [
        _read_profile(optimizer, number, specs, config)
        for number, (specs, config) in enumerate(zip(distinct, configs, strict=True))
    ]


def _preconditioner_config(options: Mapping[str, Any]) -> PreconditionerConfig:
    config = options.get("preconditioner_config", DefaultShampooConfig)
    # By exact type: nobody knows what another class costs.
    cls = base_class_of(config)
    known = [getattr(room, cls.__name__, None) for room in (base, preconditioners)]
    if not isinstance(config, PreconditionerConfig) or cls not in known:
        raise ValueError(
            f"preconditioner_config={type(config).__name__} can't be planned: it must be one of "
            "Distributed Shampoo's or of dash_shampoo's own preconditioner configs."
        )
    return config


class _Allocating(DistributedShampoo):
    """The base's optimizer, which allocates what it may be unable to compute itself."""

    def _select_distributor_class(self, distributed_config: Any) -> Any:
        return own_distributor_class(distributed_config)  # Meta's knows no parts of rows

    def _preconditioner_config_to_list_cls(
        self, state_lists: Any, group: dict[str, Any], preconditioner_config: Any
    ) -> Any:
        if isinstance(preconditioner_config, ScalarAdaGradPreconditionerConfig):
            return scalar_list(preconditioner_config, self.state, state_lists[DISTRIBUTOR])
        lists = super()._preconditioner_config_to_list_cls(
            state_lists, group, preconditioner_config
        )
        if isinstance(lists, PreconditionerList):
            # The embedded base checks its own lists, by their exact type, for what they can compute.
            lists.__class__ = type(type(lists).__name__, (type(lists),), {})
        return lists


def _single_device(options: Mapping[str, Any]) -> SingleDeviceDistributedConfig:
    given = options.get("distributed_config", SingleDeviceDistributedConfig())
    return SingleDeviceDistributedConfig(
        target_parameter_dimensionality=given.target_parameter_dimensionality
    )


def _read_profile(
    optimizer: DistributedShampoo,
    number: int,
    specs: Sequence[ParameterSpec],
    config: PreconditionerConfig,
) -> GroupProfile:
    group = optimizer.param_groups[number]
    saved = optimizer.state_dict()
    ids, state = saved["param_groups"][number]["params"], saved["state"]
    lists = optimizer._per_group_state_lists[number]
    specs_of_blocks = block_specs(
        lists[SHAMPOO_PRECONDITIONER_LIST], lists[DISTRIBUTOR].local_blocked_params
    )
    blocks = {}
    shared: dict[int, Tensor] = {}
    for spec, identifier, param in zip(specs, ids, group["params"], strict=True):
        blocks[spec] = tuple(
            BlockCost(next(specs_of_blocks), tuple(_bytes_by_kind(value).items()))
            for value in state[identifier].values()
            if isinstance(value, Mapping)
        )
        shared.update((id(v), v) for v in optimizer.state[param].values() if isinstance(v, Tensor))
    if isinstance(config, RootInvShampooPreconditionerConfig):
        for root in {r for costs in blocks.values() for block in costs for r in block.spec.roots}:
            check_supported(config.amortized_computation_config, root)
    return GroupProfile(
        options={**group, "preconditioner_config": config},
        shared_bytes=sum(map(_num_bytes, shared.values())),
        blocks=blocks,
    )


def _bytes_by_kind(state: Mapping[Any, Any], name: str = "") -> Counter[str]:
    """Bytes of a nested state by the innermost name above each tensor."""
    result: Counter[str] = Counter()
    for key, value in state.items():
        inner = name if str(key).isdigit() else str(key)
        if isinstance(value, Mapping):
            result.update(_bytes_by_kind(value, inner))
        elif isinstance(value, Tensor):
            result[inner] += _num_bytes(value)
    return result


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
