"""What we read of the base's lists: what a stacked one needs, and their blocks as a layout sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from dash_shampoo.base import name as base_name
from dash_shampoo.buckets.layout import BlockSpec

_TESTED_COMMIT = "f606606"

LIST_SEAMS = (
    "_local_kronecker_factors_unwrapped",
    "_local_preconditioned_dims_selector_list",
    "_preconditioner_config",
    "_beta2",
    "_weighting_factor",
    "_epsilon",
    "_use_bias_correction",
    "_bias_correction2",
    "update_preconditioners",
    "precondition",
    "compress_preconditioner_list",
)
BLOCK_SEAMS = (
    "factor_matrices",
    "factor_matrix_indices",
    "roots",
    "use_symmetric_packing",
    "_failed_amortized_computation_counter",
)


def missing_seam(
    base_list: object, block_seams: Sequence[str], list_seams: Sequence[str] = LIST_SEAMS
) -> str | None:
    """The first attribute that a stacked list needs and `base_list` lacks, or None.

    Args:
        base_list: A list as the base built it.
        block_seams: What the base's record of a block must have.
        list_seams: What the list must have.

    Returns:
        Its name.
    """
    records = getattr(base_list, "_local_kronecker_factors_unwrapped", ())
    wanted = [(base_list, list_seams), *((record, block_seams) for record in records)]
    missing = (
        f"{type(owner).__name__}.{name}"
        for owner, names in wanted
        for name in names
        if not hasattr(owner, name)
    )
    return next(missing, None)


def explanation_of(seam: str) -> str:
    """What a missing seam means.

    Args:
        seam: Its name.
    """
    return (
        f"This version of Distributed Shampoo (base {base_name!r}) lacks {seam}, which DashShampoo was "
        f"tested with at commit {_TESTED_COMMIT} of facebookresearch/optimizers."
    )


def block_specs(base_list: Any, blocks: Sequence[Tensor]) -> Iterator[BlockSpec]:
    """The blocks of a list of the base's; where it has no factor matrices, no dimension is selected.

    Args:
        base_list: The list.
        blocks: Its blocks, all of them.

    Yields:
        One for each block, in order.
    """
    records = getattr(base_list, "_local_kronecker_factors_unwrapped", ())
    for index, block in enumerate(blocks):
        selector: tuple[bool, ...] = (False,) * block.dim()
        roots: tuple[float, ...] = ()
        if records:
            selector = tuple(base_list._local_preconditioned_dims_selector_list[index])
            roots = tuple(records[index].roots)
            # The one root is that of the second moment; the factor matrices are decomposed alone.
            if hasattr(records[index], "corrected_eigenvalues"):
                roots = (1.0,) * sum(selector)
        yield BlockSpec(tuple(block.shape), selector, roots, block.dtype, block.device)
