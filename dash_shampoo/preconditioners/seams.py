"""What the stacked lists need of the base's lists, looked for before one is adopted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dash_shampoo.base import (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    EighEigendecompositionConfig,
    MatrixFunctionConfig,
    NewtonSchulzOrthogonalizationConfig,
    QREigendecompositionConfig,
    SVDOrthogonalizationConfig,
)
from dash_shampoo.base import name as base_name

logger = logging.getLogger(__name__)

_TESTED_COMMIT = "f606606"
_METHODS_OF_BASE = (
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    EighEigendecompositionConfig,
    NewtonSchulzOrthogonalizationConfig,
    QREigendecompositionConfig,
    SVDOrthogonalizationConfig,
)

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


def explanation_of(seam: str) -> str:
    """What a missing seam means.

    Args:
        seam: Its name.
    """
    return (
        f"This version of Distributed Shampoo (base {base_name!r}) lacks {seam}, which DashShampoo was "
        f"tested with at commit {_TESTED_COMMIT} of facebookresearch/optimizers."
    )


def fall_back(base_list: Any, seam: str, method: MatrixFunctionConfig | None) -> Any:
    """The base's own list in the place of a stacked one, which is logged.

    Args:
        base_list: The list.
        seam: What it lacks.
        method: How matrix functions are computed, if at all.

    Returns:
        The list.

    Raises:
        RuntimeError: If the method is one that the base doesn't have.
    """
    explanation = explanation_of(seam)
    if method is not None and type(method) not in _METHODS_OF_BASE:
        raise RuntimeError(
            f"{explanation} The base itself cannot compute {type(method).__name__}; use that commit, or "
            "set DASH_SHAMPOO_BASE=embedded."
        )
    logger.warning("%s It runs on the base's own list, block by block.", explanation)
    return base_list
