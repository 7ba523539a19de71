"""What an inverse root costs with its write, seen from outside while its solver runs on a small matrix."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction

import torch

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.stack import inverse_root
from dash_shampoo.products import ProductCount, assumed_kernels, count_products

# No solver has tall operands of this width, so that a product of N×N matrices is told from the others.
_SIZE = 48


def num_products(
    config: RootInvConfig,
    root: int | float | Fraction,
    *,
    epsilon: float = 0.0,
    dtype: torch.dtype = torch.float32,
    condition_number: float = 1e6,
    residual_threshold: float | None = None,
    has_kernels: bool = False,
) -> ProductCount:
    """Count what a solver multiplies for one N×N matrix; the same for every N.

    Args:
        config: The solver.
        root: p of A^(-1/p).
        epsilon: Damping.
        dtype: Dtype of the matrix.
        condition_number: Of the matrix, whose eigenvalues are spread evenly in their logarithm; solvers with
            a stopping rule depend on it.
        residual_threshold: As of `solve_stack`.
        has_kernels: Whether what is counted is a device's that has our kernels; else it is the CPU's.

    Returns:
        The count.

    Raises:
        ValueError: As of `inverse_root`.

    Examples:
        >>> from dash_shampoo import NewtonDBConfig
        >>> num_products(NewtonDBConfig(), 4).num_products
        54.0
    """
    eigenvalues = condition_number ** -torch.linspace(
        0.0, 1.0, _SIZE, dtype=torch.float64, device="cpu"
    )
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(_SIZE, _SIZE, generator=generator, dtype=torch.float64, device="cpu")
    Q = torch.linalg.qr(noise).Q
    A = ((Q * eigenvalues) @ Q.T).to(dtype)[None]
    A = (A + A.mT) / 2
    value = torch.empty_like(A)

    def solve() -> None:
        value.copy_(inverse_root(A, root, config, epsilon, residual_threshold).value)

    with assumed_kernels() if has_kernels else nullcontext():
        solve()  # which also makes the constants that stay
        with count_products(num_blocks=1, size=_SIZE) as count:
            solve()
    return count
