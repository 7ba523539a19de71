"""The plan of an optimizer on many ranks: who owns what, what it costs, and how even it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dash_shampoo.base import SingleDeviceDistributedConfig
from dash_shampoo.base import name as base_name
from dash_shampoo.planning.blocks import ParameterSpec, profile_groups, read_groups
from dash_shampoo.planning.devices import Device
from dash_shampoo.planning.ranks import GroupPlanner, RankPlan
from dash_shampoo.planning.solver_cost import SolverCost
from dash_shampoo.planning.spread import Parallelism, check_assignment, local_shards


@dataclass(frozen=True)
class InverseRoots:
    """The inverse roots of one size, root and solver, of all ranks together.

    Attributes:
        group: Number of the parameter group.
        size: N of the N×N factor matrices.
        root: p of A^(-1/p).
        num_matrices: How many there are.
        precondition_frequency: Steps from one refresh to the next.
        cost: What one of them costs.
    """

    group: int
    size: int
    root: float
    num_matrices: int
    precondition_frequency: int
    cost: SolverCost


@dataclass(frozen=True)
class OptimizerPlan:
    """The plan of all ranks.

    Attributes:
        parallelism: How many ranks there are and what they share.
        base: The base whose rules were used, "meta" or "embedded".
        num_parameters: Scalars in the model's parameters.
        device: For the roofline, or None.
        ranks: One plan per rank.
        inverse_roots: What the solver has to do, largest matrices first.
    """

    parallelism: Parallelism
    base: str
    num_parameters: int
    device: Device | None
    ranks: tuple[RankPlan, ...]
    inverse_roots: tuple[InverseRoots, ...]

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of optimizer state by kind, of all ranks together."""
        return dict(sum((Counter(rank.state_bytes) for rank in self.ranks), Counter()))

    @property
    def flops(self) -> list[float]:
        """FLOPs of each rank's step, eigendecompositions included."""
        return [r.step.matmul_flops + r.step.eigendecomposition_flops for r in self.ranks]

    @property
    def flops_balance(self) -> float:
        """FLOPs of the busiest rank over the mean."""
        return balance(self.flops)

    @property
    def state_balance(self) -> float:
        """State of the fullest rank over the mean."""
        return balance([rank.total_state_bytes for rank in self.ranks])

    @property
    def num_idle(self) -> int:
        """Ranks that own no block."""
        return sum(rank.num_blocks == 0 for rank in self.ranks)

    @property
    def seconds(self) -> float:
        """Roofline of the slowest rank's step; 0 without a device."""
        return max(rank.step.seconds for rank in self.ranks)


def balance(values: Sequence[float]) -> float:
    """Largest value over the mean: 1 is even; as many as there are values means that one has all.

    Args:
        values: One per rank, at least 0.

    Returns:
        The quotient; 1 where all are 0.

    Examples:
        >>> balance([3, 1, 0, 0])
        3.0
    """
    return max(values) * len(values) / sum(values) if any(values) else 1.0


def plan_optimizer(
    params: Iterable[Any],
    parallelism: Parallelism | None = None,
    device: Device | None = None,
    use_tf32: bool = False,
    **options: Any,
) -> OptimizerPlan:
    """Plans what `DashShampoo(params, **options)` is on every rank, without allocating it.

    Args:
        params: As for the optimizer: (named) parameters or groups of them. Only shapes and dtypes are
            looked at, so a model on the meta device will do.
        parallelism: How many ranks there are and what they share. Default: one rank.
        device: Where the roofline is taken; `DEVICES` has some. Default: none.
        use_tf32: Whether float32 matmuls outside the inverse roots use TF32. Default: False.
        **options: The optimizer's own arguments. Of its `distributed_config` the plan uses
            `num_trainers_per_group`, `load_balancing_config`, `communication_dtype` and
            `target_parameter_dimensionality`; its type does not matter.

    Returns:
        The plan.

    Raises:
        ValueError: If an option is out of its range or can't be planned.
        NotImplementedError: If the base lacks an option.

    Note:
        The step is one in the middle of training: after `start_preconditioning_step`, with all
        gradients there. What DDP or `fully_shard` communicate themselves (gradients, parameters) is
        not counted.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2048, 1024, device="meta")
        >>> plan = plan_optimizer(model.parameters(), Parallelism(strategy="ddp", world_size=2))
        >>> [rank.num_blocks for rank in plan.ranks]
        [2, 1]
    """
    groups = read_groups(params)
    parallelism = parallelism or Parallelism()
    distributed_configs = [
        {**options, **own}.get("distributed_config", SingleDeviceDistributedConfig())
        for _, own in groups
    ]
    for config in distributed_configs:
        check_assignment(config)
    local = [_local_parameters(specs, parallelism.num_shards) for specs, _ in groups]
    profiles = profile_groups(
        [[spec for shard in shards for spec in shard] for shards in local],
        [own for _, own in groups],
        options,
    )
    planners = [
        GroupPlanner(profile, parallelism, config, device, use_tf32)
        for profile, config in zip(profiles, distributed_configs, strict=True)
    ]
    by_group = [
        [
            planner.plan(shards[parallelism.shard_of(rank)], parallelism.replica_of(rank))
            for rank in range(parallelism.world_size)
        ]
        for planner, shards in zip(planners, local, strict=True)
    ]
    return OptimizerPlan(
        parallelism=parallelism,
        base=base_name,
        num_parameters=sum(math.prod(spec.shape) for specs, _ in groups for spec in specs),
        device=device,
        ranks=tuple(sum(parts, RankPlan()) for parts in zip(*by_group, strict=True)),
        inverse_roots=tuple(
            entry
            for number, (planner, plans) in enumerate(zip(planners, by_group, strict=True))
            for entry in _inverse_roots(number, planner, plans)
        ),
    )


def _local_parameters(
    specs: Sequence[ParameterSpec], num_shards: int
) -> list[tuple[ParameterSpec, ...]]:
    """What each shard has of the parameters."""
    cuts = {spec: local_shards(spec, num_shards) for spec in dict.fromkeys(specs)}
    return [
        tuple(part for spec in specs if (part := cuts[spec][shard]) is not None)
        for shard in range(num_shards)
    ]


def _inverse_roots(
    group: int, planner: GroupPlanner, plans: Sequence[RankPlan]
) -> list[InverseRoots]:
    numbers: Counter[tuple[int, float]] = Counter()
    for plan in plans:
        for stack in plan.stacks:
            numbers[stack.size, stack.root] += stack.num_matrices
    return [
        InverseRoots(
            group=group,
            size=size,
            root=root,
            num_matrices=number,
            precondition_frequency=planner.cost.precondition_frequency,
            cost=planner.cost.solver_cost(root),
        )
        for (size, root), number in sorted(numbers.items(), reverse=True)
    ]
