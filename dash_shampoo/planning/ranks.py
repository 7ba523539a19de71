"""The part of one rank: its blocks, stacks, memory and work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from dash_shampoo.base import DistributedConfig
from dash_shampoo.buckets.layout import make_layout
from dash_shampoo.planning.blocks import GroupProfile, ParameterSpec
from dash_shampoo.planning.costs import GroupCost, StepCost, sums_of_fields
from dash_shampoo.planning.devices import Device
from dash_shampoo.planning.spread import Parallelism, Sharing, share

SHARED = "shared"
"""The kind of state that the parameters of a group share: the step count and the like."""


@dataclass(frozen=True)
class StackCount:
    """The factor matrices of one stack.

    Attributes:
        size: N of the N×N factor matrices.
        root: p of A^(-1/p).
        num_matrices: How many lie in the stack.
    """

    size: int
    root: float
    num_matrices: int


@dataclass(frozen=True)
class RankPlan:
    """What a rank owns and does.

    Attributes:
        num_blocks: Blocks that it owns.
        num_buckets: Sets of blocks of one shape: one batched matmul each per step and dimension; blocks
            preconditioned by elements are in none.
        stacks: Their factor matrices: one batched inverse root each.
        state_bytes: Bytes of optimizer state by kind, the keys of the optimizer's state.
        buffer_bytes: Bytes of the buffer that updates are gathered in; not part of the state.
        received_bytes: Bytes that it receives from other ranks per step, and sends to them.
        step: FLOPs and roofline of a step.
    """

    num_blocks: int = 0
    num_buckets: int = 0
    stacks: tuple[StackCount, ...] = ()
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    buffer_bytes: int = 0
    received_bytes: int = 0
    step: StepCost = field(default_factory=StepCost)

    @property
    def total_state_bytes(self) -> int:
        """Bytes of optimizer state of all kinds."""
        return sum(self.state_bytes.values())

    def __add__(self, other: RankPlan) -> RankPlan:
        return RankPlan(*sums_of_fields(self, other))


class GroupPlanner:
    """Plans of a parameter group, by what a rank holds of it and which of its owners the rank is.

    Args:
        profile: The group's settings and blocks.
        parallelism: How many ranks there are and what they share.
        distributed_config: The group's; how blocks are shared out.
        device: For the roofline; None for none.
        use_tf32: Whether the matmuls outside the inverse roots use TF32 for float32.
    """

    def __init__(
        self,
        profile: GroupProfile,
        parallelism: Parallelism,
        distributed_config: DistributedConfig,
        device: Device | None,
        use_tf32: bool,
    ) -> None:
        self.cost = GroupCost(profile, device, use_tf32)
        self._profile = profile
        self._parallelism = parallelism
        self._distributed_config = distributed_config
        self._device = device
        self._num_owners = parallelism.num_owners(distributed_config)
        # Most ranks hold the same as others.
        self._plan = cache(self._plan_anew)
        self._sharing = cache(self._sharing_anew)

    def plan(self, local: tuple[ParameterSpec, ...], replica: int) -> RankPlan:
        """The part of a rank in this group.

        Args:
            local: The parameters, or shards of them, that the rank holds.
            replica: Which of the ranks that hold them it is.

        Returns:
            The plan.
        """
        return self._plan(local, replica % self._num_owners)

    def _sharing_anew(self, local: tuple[ParameterSpec, ...]) -> Sharing:
        blocks = [block for spec in local for block in self._profile.blocks[spec]]
        return share(blocks, self._num_owners, self._distributed_config)

    def _plan_anew(self, local: tuple[ParameterSpec, ...], owner: int) -> RankPlan:
        sharing = self._sharing(local)
        owned = sharing.blocks[owner]
        stacked = owned if self._profile.shampoo is not None else ()
        plan = make_layout([block.spec for block in stacked])
        state: Counter[str] = Counter({SHARED: self._profile.shared_bytes})
        for block in owned:
            state.update(dict(block.state_bytes))
        buffer_bytes = received_bytes = 0
        if self._parallelism.is_gathered:
            buffer_bytes = self._num_owners * sharing.largest_buffer
            received_bytes = buffer_bytes - sharing.largest_buffer
        work = sum(map(self.cost.of_block, owned), StepCost())
        return RankPlan(
            num_blocks=len(owned),
            num_buckets=len(plan.buckets),
            stacks=tuple(StackCount(s.size, s.root, len(s.slots)) for s in plan.stacks),
            state_bytes=dict(state),
            buffer_bytes=buffer_bytes,
            received_bytes=received_bytes,
            step=work + self._update_cost(local, received_bytes),
        )

    def _update_cost(self, local: Sequence[ParameterSpec], received_bytes: int) -> StepCost:
        """The gathering of the updates and their addition to all local parameters."""
        if self._device is None:
            return StepCost()
        num_bytes = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in local)
        return StepCost(
            # The update is read, the parameter read and written.
            elementwise_seconds=3 * num_bytes / self._device.memory_bandwidth,
            communication_seconds=self._device.gather_seconds(
                received_bytes, self._num_owners, self._parallelism.num_shards
            ),
        )
