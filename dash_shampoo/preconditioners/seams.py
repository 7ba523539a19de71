"""What the stacked lists need of the base's lists, looked for before one is adopted."""

from __future__ import annotations

from collections.abc import Sequence

LIST_SEAMS = (
    "_local_kronecker_factors_unwrapped",
    "_local_preconditioned_dims_selector_list",
    "_dims_list",
    "_preconditioner_config",
    "_beta2",
    "_weighting_factor",
    "_epsilon",
    "_use_bias_correction",
    "_bias_correction2",
    "_update_factor_matrices",
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
    for name in list_seams:
        if not hasattr(base_list, name):
            return f"{type(base_list).__name__}.{name}"
    for block in getattr(base_list, "_local_kronecker_factors_unwrapped", ()):
        for name in block_seams:
            if not hasattr(block, name):
                return f"{type(block).__name__}.{name}"
    return None
