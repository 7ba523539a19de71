"""Configs of how parameters, state and work are spread over processes."""

import enum
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dash_shampoo.base.embedded.matrix_function_configs import Config, check

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class CostModel(Config, abstract=True):
    """What a block costs its owner."""

    def cost(self, tensor: Tensor) -> float:
        """The cost of a block."""
        raise NotImplementedError(f"{type(self).__name__}.cost")


@dataclass
class AlignedMemoryCostModel(CostModel):
    """Bytes of the block, rounded up.

    Attributes:
        alignment_bytes: What to round up to a multiple of. (Default: 64)
    """

    alignment_bytes: int = 64

    def cost(self, tensor: Tensor) -> float:
        """The number of bytes, rounded up."""
        num_bytes = tensor.numel() * tensor.element_size()
        return -(-num_bytes // self.alignment_bytes) * self.alignment_bytes


@dataclass
class PolynomialComputationalCostModel(CostModel):
    """Sum over the dimensions n of max(min_cost, c₀ + c₁n + c₂n² + …).

    Attributes:
        coefficients: c, in increasing degree.
        min_cost: Least cost of a dimension. (Default: 0)
    """

    coefficients: tuple[float, ...]
    min_cost: float = 0

    def cost(self, tensor: Tensor) -> float:
        """The sum of the polynomial over the dimensions."""
        return sum(max(self.min_cost, self._polynomial(n)) for n in tensor.shape)

    def _polynomial(self, n: int) -> float:
        # Horner's scheme, as every process of every base must round alike.
        return reduce(lambda value, c: value * n + c, reversed(self.coefficients), 0.0)


def assign_owners(blocks: Sequence[Tensor], num_owners: int, cost_model: CostModel) -> list[int]:
    """Shares blocks out: the costliest block first, each to whoever has the least so far.

    Args:
        blocks: The blocks, on any device.
        num_owners: How many processes share them.
        cost_model: What a block costs.

    Returns:
        The owner of each block, the same on every process.
    """
    costs = [cost_model.cost(block) for block in blocks]
    loads = [(0.0, owner) for owner in range(num_owners)]
    owners = [0] * len(blocks)
    for index in sorted(range(len(blocks)), key=costs.__getitem__, reverse=True):
        load, owner = heapq.heappop(loads)
        owners[index] = owner
        heapq.heappush(loads, (load + costs[index], owner))
    return owners


@dataclass(kw_only=True)
class LoadBalancingConfig:
    """How blocks are shared out.

    Attributes:
        cost_model: The cost of a block. (Default: AlignedMemoryCostModel())
    """

    cost_model: CostModel = field(default_factory=AlignedMemoryCostModel)


@dataclass
class DistributedConfig(Config, abstract=True):
    """How parameters are spread over processes.

    Attributes:
        target_parameter_dimensionality: Adjacent small dimensions are merged until this many are
            left; math.inf merges nothing. (Default: 1)
    """

    target_parameter_dimensionality: int | float = 1

    def __post_init__(self) -> None:
        name, value = "target_parameter_dimensionality", self.target_parameter_dimensionality
        check(not isinstance(value, float) or value == math.inf, name, value, "an int or math.inf")
        check(value >= 1, name, value, ">= 1")


@dataclass(kw_only=True)
class SingleDeviceDistributedConfig(DistributedConfig):
    """One process does everything (or every process the same)."""


DefaultSingleDeviceDistributedConfig = SingleDeviceDistributedConfig()


@dataclass(kw_only=True)
class DDPDistributedConfig(DistributedConfig):
    """Replicated parameters (DDP or `replicate`), with the blocks' state and work spread (ZeRO-1).

    Attributes:
        communication_dtype: Dtype of what is gathered. (Default: torch.float32)
        num_trainers_per_group: Over how many processes the blocks are spread; -1 means all.
            (Default: -1)
        communicate_params: Whether updated parameters are gathered instead of updates.
            (Default: False)
        load_balancing_config: How the owners are chosen. (Default: LoadBalancingConfig())
    """

    communication_dtype: torch.dtype = torch.float32
    num_trainers_per_group: int = -1
    communicate_params: bool = False
    load_balancing_config: LoadBalancingConfig = field(default_factory=LoadBalancingConfig)


class FSDPParamAssignmentStrategy(enum.Enum):
    """Which part of a sharded parameter a process preconditions.

    DEFAULT: its own shard. REPLICATE (all of it) and ROUND_ROBIN (whole parameters) are not in the
    embedded base.
    """

    DEFAULT = enum.auto()
    REPLICATE = enum.auto()
    ROUND_ROBIN = enum.auto()


@dataclass(kw_only=True)
class FullyShardDistributedConfig(DistributedConfig):
    """Parameters sharded by `fully_shard` (FSDP2); every process preconditions its local shards.

    Attributes:
        param_assignment_strategy: Only DEFAULT is in the embedded base. (Default: DEFAULT)
        num_sub_groups: For the other strategies. (Default: 1)
        load_balancing_config: For the other strategies. (Default: LoadBalancingConfig())
    """

    param_assignment_strategy: FSDPParamAssignmentStrategy = FSDPParamAssignmentStrategy.DEFAULT
    num_sub_groups: int = 1
    load_balancing_config: LoadBalancingConfig = field(default_factory=LoadBalancingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.num_sub_groups >= 1, "num_sub_groups", ">= 1")
        is_default = self.param_assignment_strategy == FSDPParamAssignmentStrategy.DEFAULT
        allowed = "1 when param_assignment_strategy is DEFAULT"
        self._check(self.num_sub_groups == 1 or not is_default, "num_sub_groups", allowed)


@dataclass(kw_only=True)
class HybridShardDistributedConfig(FullyShardDistributedConfig, DDPDistributedConfig):
    """Parameters sharded by `fully_shard` on a 2D mesh (HSDP2), blocks spread over the replicas.

    Attributes:
        device_mesh: The mesh (replicate, shard).
        num_trainers_per_group: Over how many replicas the blocks are spread; -1 means all.
            (Default: -1)
    """

    device_mesh: "DeviceMesh"


def not_implemented(option: str) -> NotImplementedError:
    """The error for what only Meta's package has."""
    return NotImplementedError(
        f"{option} is not in the embedded base of dash_shampoo; Meta's distributed_shampoo package "
        "has it (install it from https://github.com/facebookresearch/optimizers, and leave "
        "DASH_SHAMPOO_BASE unset or set it to 'meta')."
    )
