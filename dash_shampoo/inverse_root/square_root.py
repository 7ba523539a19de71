"""Coupled iterations for the square root and its inverse: what Newton-Denman-Beavers and Newton-Schulz share.

Shape suffixes: A_BNN is a stack of B blocks of N×N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dash_shampoo.inverse_root.blocks import affine, diagonal
from dash_shampoo.products import Products

Coefficients = tuple[tuple[float, float, float], ...]


def square_root(
    Y: Tensor, coefficients: Coefficients, products: Products, *, is_inverse: bool
) -> Tensor:
    """Y^(1/2) or Y^(-1/2) by W = Z·Y, P = aI + bW + cW², Y ← Y·P, Z ← P·Z from Z = I.

    Args:
        Y: (B, N, N) stack with eigenvalues in (0, 1]; its memory is used.
        coefficients: (a, b, c) of each step, at least one.
        products: Products.
        is_inverse: Whether Y^(-1/2) is wanted, else Y^(1/2).

    Returns:
        (B, N, N) stack.

    Note:
        3 matmuls a step and one more where c is not 0, one less in the first, where Z = I, and in the last,
        where only Y or only Z is still needed; two less in the first for W and Z.
    """
    P, spare = torch.empty_like(Y), torch.empty_like(Y)
    W = torch.empty_like(Y) if any(c != 0.0 for _, _, c in coefficients) else P
    Z: Tensor | None = None  # the identity
    for number, (a, b, c) in enumerate(coefficients):
        if c == 0.0 and Z is not None:
            products(Z, Y, out=P, alpha=b)
            diagonal(P).add_(a)
        else:
            W_now = Y if Z is None else products(Z, Y, out=W)
            affine(W_now, b, a, out=P)
            if c != 0.0:
                products.add_to_(P, W_now, W_now, alpha=c)
        if number == len(coefficients) - 1:
            if is_inverse:
                return P if Z is None else products(P, Z, out=spare)
            return products(Y, P, out=spare)
        rounded_P = products.round(P)
        products(Y, rounded_P, out=spare)
        if Z is None:
            Y, Z, P, spare = spare, P, Y, torch.empty_like(Y)
        else:
            products(rounded_P, Z, out=Y)
            Y, Z, spare = spare, Y, Z
    raise ValueError("There must be at least one step.")
