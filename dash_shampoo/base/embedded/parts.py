"""Parameters that are cut by rows before anything else: fused matrices, batches of matrices."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded.blocking import merge_small_dims, multi_dim_split

# First element, shape and strides of a block in its parameter.
Position = tuple[int, tuple[int, ...], tuple[int, ...]]


def sizes_of_parts(num_rows: int, row_parts: int | Sequence[int]) -> tuple[int, ...]:
    """How many rows each part of a parameter has.

    Args:
        num_rows: Of the parameter.
        row_parts: How many equal parts there are, or how many rows each has.

    Returns:
        Positive numbers that add up to `num_rows`.

    Raises:
        ValueError: If there are no such parts.

    Examples:
        >>> sizes_of_parts(12, 3), sizes_of_parts(12, (8, 2, 2))
        ((4, 4, 4), (8, 2, 2))
    """
    if isinstance(row_parts, int):
        if row_parts > 0 and num_rows % row_parts == 0:
            return (num_rows // row_parts,) * row_parts
    elif min(row_parts, default=0) > 0 and sum(row_parts) == num_rows:
        return tuple(row_parts)
    raise ValueError(
        f"Invalid row_parts={row_parts!r} for a parameter of {num_rows} rows: must be a divisor of "
        "that number, or as many rows as each part has, which add up to it."
    )


def cut_by_rows(
    whole: Sequence[int], local: Tensor, first: int, param_group: Mapping[str, Any]
) -> Iterator[tuple[slice | None, Tensor, tuple[int, ...]]]:
    """The parts of what a process holds of a parameter, by the `row_parts` of its group.

    Args:
        whole: The parameter's shape.
        local: What the process holds of it, a run of its rows.
        first: The first of these rows; not looked at without `row_parts`.
        param_group: The group.

    Yields:
        The rows of each part within `local`, None for all of them; the part, of which one that ends in
        another process is cut there; its shape with small dimensions merged.

    Raises:
        ValueError: If the parameter has no such parts.
    """
    row_parts = param_group.get("row_parts")
    selections: list[slice | None] = [None]
    if row_parts is not None and whole:
        last = first + local.shape[0]
        ends = accumulate(sizes_of_parts(whole[0], row_parts))
        cuts = [first, *(end for end in ends if first < end < last), last]
        selections = [slice(a - first, b - first) for a, b in pairwise(cuts)]
    for rows in selections:
        part = local if rows is None else local[rows]
        # A single row of a tensor of matrices is a matrix.
        is_matrix = rows is not None and part.dim() > 2 and part.shape[0] == 1
        shape = merge_small_dims(
            tuple(part.shape[1:] if is_matrix else part.shape),
            param_group["max_preconditioner_dim"],
            param_group["distributed_config"].target_parameter_dimensionality,
        )
        yield rows, part, shape


def blocks_of_shards(
    whole: Sequence[int], num_shards: int | None, param_group: Mapping[str, Any]
) -> dict[str, Position]:
    """Where the blocks of a parameter lie in it, if its rows are sharded as `torch.chunk` cuts.

    Args:
        whole: The parameter's shape.
        num_shards: Among how many processes; None for a parameter that every process holds whole.
        param_group: Its group.

    Returns:
        By the key of the block in the parameter's state: its first element, its shape and strides.
        Blocks of equal position have equal state.

    Examples:
        >>> from dash_shampoo.base.embedded import SingleDeviceDistributedConfig
        >>> group = {"max_preconditioner_dim": 4, "distributed_config": SingleDeviceDistributedConfig()}
        >>> blocks_of_shards((8, 3), None, group)
        {'block_0': (0, (4, 3), (3, 1)), 'block_1': (12, (4, 3), (3, 1))}
        >>> blocks_of_shards((8, 3), 2, group)
        {'rank_0-block_0': (0, (4, 3), (3, 1)), 'rank_1-block_0': (12, (4, 3), (3, 1))}
    """
    tensor = torch.empty(tuple(whole), device="meta")
    shards = (tensor,) if num_shards is None else tensor.chunk(num_shards)
    result = {}
    first = 0
    for rank, shard in enumerate(shards):
        prefix = "" if num_shards is None else f"rank_{rank}-"
        blocks = [
            block
            for _, part, shape in cut_by_rows(whole, shard, first, param_group)
            for block in multi_dim_split(part.view(shape), param_group["max_preconditioner_dim"])
        ]
        for number, block in enumerate(blocks):
            sizes, strides = tuple(block.shape), block.stride()
            # The stride of a single row says nothing.
            strides = tuple(0 if n == 1 else k for n, k in zip(sizes, strides, strict=True))
            result[f"{prefix}block_{number}"] = (int(block.storage_offset()), sizes, strides)
        first += shard.shape[0] if whole else 0
    return result
