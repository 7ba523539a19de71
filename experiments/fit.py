"""Whether a training step fits a device: one row per optimizer, of the fullest rank."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dash_shampoo.planning import Device, OptimizerPlan, Parallelism
from experiments.memory import ModelMemory
from experiments.tables import markdown_table

_GIB, _MIB, _MILLI = 2**30, 2**20, 1e-3
# What a step allocates for a time, in bytes of the blocks that the rank owns: copies of gradients, both
# directions, their products. Counted by benchmarks/memory.py, as for torch's AdamW.
_STEP_COPIES, _ADAMW_COPIES = 5, 1
# What a solver holds beside a stack, in stacks; the cap on its memory bounds it where stacks are large.
_SOLVER_STACKS = 16
# AdamW reads parameter, gradient and two moments, and writes all but the gradient.
_ADAMW_PASSES = 7
# Of the device's memory for CUDA's context, kernels' workspaces and what the allocator can't use.
_SPARE = 0.08


@dataclass(frozen=True)
class Fit:
    """Bytes of the fullest rank.

    Attributes:
        name: The optimizer.
        parameters: The rank's parameters and buffers.
        gradients: And what they are reduced in.
        state: Of the optimizer, with the buffer that updates are gathered in.
        activations: Of a forward and a backward pass; None if it can't be counted.
        step: What the optimizer's step allocates for a time.
        seconds: Roofline of the optimizer's step.
        received: Bytes that the optimizer receives per step.
        memory: What the device has.
    """

    name: str
    parameters: float
    gradients: float
    state: float
    activations: float | None
    step: float
    seconds: float
    received: float
    memory: float

    @property
    def peak(self) -> float:
        """The most at a time: the step comes when the activations are gone."""
        fixed = self.parameters + self.gradients + self.state
        return fixed + max(self.activations or 0.0, self.step)

    @property
    def fits(self) -> bool:
        """Whether that leaves the device some memory."""
        return self.peak <= (1 - _SPARE) * self.memory

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "peak": self.peak, "fits": self.fits}


def fits(
    name: str,
    plan: OptimizerPlan | None,
    memory: ModelMemory,
    has_activations: bool,
    parallelism: Parallelism,
    device: Device,
    max_workspace_bytes: int,
) -> list[Fit]:
    """The rows of a plan.

    Args:
        name: Of the planned optimizer.
        plan: None where AdamW alone is asked for.
        memory: Of the model.
        has_activations: Whether its passes could be counted.
        parallelism: Number of ranks, and what they share.
        device: What it shall fit.
        max_workspace_bytes: Cap on the memory of the inverse roots.

    Returns:
        The planned optimizer and AdamW.
    """
    shards = parallelism.num_shards
    parameters, gradients = memory.parameters / shards, memory.gradients / shards
    activations: float | None = None
    if has_activations:
        # Sharded: a unit's parameters and gradients are whole for a time, and the next one's.
        activations = memory.training + (3 * memory.largest_unit if shards > 1 else 0)
    if shards == 1 and parallelism.world_size > 1:
        gradients *= 2  # DistributedDataParallel reduces in buckets of its own
    common = (activations, device.memory_bytes)
    rows = []
    if plan is not None:
        rank = max(plan.ranks, key=lambda r: r.total_state_bytes + r.buffer_bytes)
        share = rank.total_state_bytes / max(sum(r.total_state_bytes for r in plan.ranks), 1)
        copies = 1 if parallelism.is_gathered else parallelism.num_replicas
        owned = memory.gradients * min(share * copies, 1.0)
        stacks = rank.state_bytes.get("factor_matrices", 0)
        rows.append(
            Fit(
                name,
                parameters,
                gradients,
                rank.total_state_bytes + rank.buffer_bytes,
                common[0],
                _STEP_COPIES * owned + min(max_workspace_bytes, _SOLVER_STACKS * stacks),
                plan.seconds,
                max(r.received_bytes for r in plan.ranks),
                common[1],
            )
        )
    local = memory.gradients / shards
    seconds = _ADAMW_PASSES * local / device.memory_bandwidth
    state, step = 2 * local, _ADAMW_COPIES * local
    rows.append(
        Fit("AdamW", parameters, gradients, state, common[0], step, seconds, 0.0, common[1])
    )
    return rows


def fit_table(rows: Sequence[Fit]) -> str:
    """The rows as a table.

    Args:
        rows: What `fits` returned.

    Returns:
        Markdown.
    """
    header = [
        "GiB of the fullest rank", "parameters", "gradients", "state", "activations", "step's own",
        "peak", "fits", "step, ms", "received, MiB",
    ]  # fmt: skip
    return markdown_table(
        header,
        [
            [
                row.name,
                *(f"{size / _GIB:.2f}" for size in (row.parameters, row.gradients, row.state)),
                "?" if row.activations is None else f"{row.activations / _GIB:.2f}",
                *(f"{size / _GIB:.2f}" for size in (row.step, row.peak)),
                "yes" if row.fits else "NO",
                f"{row.seconds / _MILLI:.1f}",
                f"{row.received / _MIB:.0f}",
            ]
            for row in rows
        ],
    )
