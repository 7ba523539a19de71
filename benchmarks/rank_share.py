"""What one of several ranks has to do: the blocks of a model that the base's own rule gives it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dash_shampoo.base import DDPDistributedConfig, assign_owners
from dash_shampoo.planning.blocks import META, ParameterSpec, profile_groups

Shape = tuple[int, ...]


def blocks_of_rank(shapes: Sequence[Shape], block: int, world_size: int) -> list[tuple[int, Shape]]:
    """The blocks of the rank that has most to do.

    Args:
        shapes: Of the model's parameters.
        block: Largest block, `max_preconditioner_dim`.
        world_size: Number of ranks.

    Returns:
        For each block the number of its parameter, and its shape.
    """
    specs = [ParameterSpec(tuple(shape), torch.float32) for shape in shapes]
    (profile,) = profile_groups([specs], [{}], {"max_preconditioner_dim": block})
    blocks = [
        (number, tuple(cut.spec.shape))
        for number, spec in enumerate(specs)
        for cut in profile.blocks[spec]
    ]
    cost_model = DDPDistributedConfig().load_balancing_config.cost_model
    tensors = [torch.empty(shape, device=META) for _, shape in blocks]
    owners = assign_owners(tensors, world_size, cost_model)
    owned: list[list[tuple[int, Shape]]] = [[] for _ in range(world_size)]
    for one, owner in zip(blocks, owners, strict=True):
        owned[owner].append(one)
    return max(owned, key=_work)


def _work(blocks: Sequence[tuple[int, Shape]]) -> float:
    """Roughly the FLOPs of the inverse roots."""
    return sum(float(size) ** 3 for _, shape in blocks for size in shape)
