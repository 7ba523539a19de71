"""Which precision of products keeps a root's error: `matmul_precision="auto"`."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torch import Tensor

from dash_shampoo.products import MatmulPrecision, Products

Precision = MatmulPrecision | Literal["auto"]

_TABLE = Path(__file__).with_name("rounding.json")
# By the peak rates of every device that has the fused square (`planning.devices`), which moves the same bytes
# at each. bf16 is as fast as fp16 and eight times coarser.
_FASTEST_FIRST: tuple[MatmulPrecision, ...] = ("fp16", "tf32", "fp16x3")
# What rounding may add: of the polynomial's error, and at most; above that, eigenvalues that rounding makes
# negative come near the end of the interval, beyond which the polynomial grows.
_SHARE, _MOST = 0.5, 0.1


@lru_cache(maxsize=1)
def _errors() -> dict[str, dict[float, float]]:
    rows = json.loads(_TABLE.read_text())["error"]
    return {name: {float(key): value for key, value in row.items()} for name, row in rows.items()}


@lru_cache(maxsize=256)
def precision_within(error: float, relative_epsilon: float) -> MatmulPrecision:
    """The fastest precision whose rounding adds at most half of the polynomial's error, and 0.1.

    Args:
        error: Of the polynomial.
        relative_epsilon: Damping; that of the table's next smaller one counts.

    Returns:
        "fp16", "tf32" or "fp16x3"; the last one where the table knows none.

    Examples:
        >>> precision_within(0.01, 1e-6), precision_within(0.6, 1e-2)
        ('fp16x3', 'fp16')
    """
    for precision in _FASTEST_FIRST:
        row = _errors()[precision]
        known = [damping for damping in row if damping <= relative_epsilon * (1.0 + 1e-9)]
        if known and row[max(known)] <= min(_SHARE * error, _MOST):
            return precision
    return _FASTEST_FIRST[-1]


def resolved(
    precision: Precision, A: Tensor, error: float, relative_epsilon: float
) -> MatmulPrecision:
    """What "auto" stands for on a stack: by its device and the tables, never by torch's global switches.

    Args:
        precision: Of the config.
        A: (B, N, N) stack.
        error: Of the polynomial.
        relative_epsilon: Damping.

    Returns:
        `precision`; for "auto" as of `precision_within` where squares are fused, else "fp32".
    """
    if precision != "auto":
        return precision
    fastest = precision_within(error, relative_epsilon)
    return fastest if Products(fastest).can_fuse(A) else "fp32"
