"""Parameters that are cut by rows before anything else: fused matrices, batches of matrices."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import Tensor

from dash_shampoo.base.embedded.dtensors import first_row


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


def parts_of(
    param: Tensor, local: Tensor, row_parts: int | Sequence[int] | None
) -> list[slice | None]:
    """The parts of what a process holds of a parameter.

    Args:
        param: The parameter.
        local: What this process has of it.
        row_parts: As of `sizes_of_parts`, of the whole parameter; None for one part.

    Returns:
        The rows of each part within `local`; None for all of them. Parts that end in other processes are
        cut there.

    Raises:
        ValueError: If the parameter has no such parts.
    """
    if row_parts is None or not param.dim():
        return [None]
    ends = list(accumulate(sizes_of_parts(param.shape[0], row_parts)))
    start = first_row(param)
    stop = start + local.shape[0]
    cuts = [start, *(end for end in ends if start < end < stop), stop]
    return [slice(a - start, b - start) for a, b in pairwise(cuts)]
