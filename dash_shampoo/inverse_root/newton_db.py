"""Newton-Denman-Beavers iteration for the roots 2, 4 and 8, a fixed number of steps.

Shape suffixes: A_BNN is a stack of B blocks of N×N.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.config import NewtonDBConfig
from dash_shampoo.inverse_root.blocks import (
    affine_identity_,
    damped,
    per_block,
    rescaled_symmetric,
)
from dash_shampoo.inverse_root.matmul import Matmul, MatmulCounter
from dash_shampoo.inverse_root.result import InverseRootResult, make_result
from dash_shampoo.inverse_root.scaling import compute_scale

_PASSES = {2: 1, 4: 2, 8: 3}


def check(config: NewtonDBConfig, root: Fraction) -> None:
    """Refuse a root that repeated square roots don't reach.

    Args:
        config: Unused; part of the signature of every check.
        root: p of A^(-1/p).

    Raises:
        ValueError: If the root is not 2, 4 or 8.
    """
    if root not in _PASSES:
        raise ValueError(
            f"root={root} is not one of 2, 4, 8, the roots of NewtonDBConfig; EigenConfig and "
            "ChebyshevConfig take any root."
        )


def newton_db(
    A: Tensor, root: Fraction, config: NewtonDBConfig, epsilon: float
) -> InverseRootResult:
    """A^(-1/p), p = 2, 4, 8, by E = (3I - Z·Y)/2, Y ← Y·E, Z ← E·Z from Y_0 = A/s, Z_0 = I.

    One pass takes Y to (A/s)^(1/2) and Z to (A/s)^(-1/2). p = 4 takes the square root first and
    then its inverse square root, p = 8 two square roots; the spectrum of a square root is in
    (0, 1] again, so only the first pass needs a scale. The result is multiplied by s^(-1/p).

    Converges for eigenvalues of A/s in (0, 3), quadratically near 1; an eigenvalue x far below 1
    grows by 9/4 a step, so `num_iterations` steps invert it only if x is above about
    (4/9)^num_iterations. Smaller ones are damped by one pass, but over-inverted (up to 2.18×) by
    two. The order of the products is what keeps it stable: none of them may be computed as a
    triangle and mirrored, and bf16 products diverge on real factor matrices.

    Args:
        A: (B, N, N) stack, finite, float32 or float64. Not modified.
        root: 2, 4 or 8.
        config: Steps, scale, precision of the products, fused or separate updates.
        epsilon: Damping, at least 0.

    Returns:
        Roots, exactly symmetric; iterations = the steps of all passes; no residual. A block of
        zeros with epsilon = 0 gives a finite multiple of the identity.

    Note:
        Per pass 1 matmul in the first step, 3 in each later one, and one less in the last step,
        where only Y or only Z is still needed: 3·num_iterations - 3, so 27 / 54 / 81 for ten
        steps and p = 2 / 4 / 8. None is symmetric by structure. No host sync.

    References:
        DASH, arXiv 2602.02016, Newton-DB; Higham, Functions of Matrices, section 6.3 and equation
        (6.35); Denman and Beavers, Appl. Math. Comput. 2 (1976).

    Examples:
        >>> A = torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64))[None]
        >>> result = newton_db(A, Fraction(2), NewtonDBConfig(), 0.0)
        >>> [round(x, 6) for x in result.value[0].diagonal().tolist()]
        [0.5, 0.25]
    """
    counter = MatmulCounter(num_blocks=A.shape[0])
    matmul = Matmul(config.matmul_precision, counter)
    A_ridge = damped(A, epsilon)
    s_B = compute_scale(A_ridge, config.scaling, counter)
    num_passes = _PASSES[root.numerator]
    Y = A_ridge / per_block(s_B)
    for _ in range(num_passes - 1):
        Y = _run_pass(Y, config, matmul, is_root_wanted=True)
    Z = _run_pass(Y, config, matmul, is_root_wanted=False)
    return make_result(
        rescaled_symmetric(Z, s_B, -1.0 / root.numerator),
        iterations=num_passes * config.num_iterations,
        damping=epsilon,
        num_matmuls=counter.total,
        num_symmetric_matmuls=counter.symmetric,
    )


def _run_pass(Y: Tensor, config: NewtonDBConfig, matmul: Matmul, *, is_root_wanted: bool) -> Tensor:
    """Y^(1/2) or Y^(-1/2) by `num_iterations` coupled steps.

    Args:
        Y: (B, N, N) stack with eigenvalues in (0, 3). Not modified.
        config: Steps, fused or separate updates.
        matmul: Products.
        is_root_wanted: Whether Y^(1/2) is wanted, else Y^(-1/2).

    Returns:
        (B, N, N) stack.
    """
    E = affine_identity_(Y.clone(), -0.5, 1.5)  # Z_0 = I
    if config.num_iterations == 1:
        return matmul(Y, E) if is_root_wanted else E
    update = _fused_update if config.use_fused_matmul else _update
    Y, Z = matmul(Y, E), E
    for _ in range(config.num_iterations - 2):
        E = affine_identity_(matmul(Z, Y), -0.5, 1.5)
        Y, Z = update(Y, E, Z, matmul)
    E = affine_identity_(matmul(Z, Y), -0.5, 1.5)
    return matmul(Y, E) if is_root_wanted else matmul(E, Z)


def _update(Y: Tensor, E: Tensor, Z: Tensor, matmul: Matmul) -> tuple[Tensor, Tensor]:
    """Y·E and E·Z, with E rounded once."""
    E = matmul.round(E)
    return matmul(Y, E), matmul(E, Z)


def _fused_update(Y: Tensor, E: Tensor, Z: Tensor, matmul: Matmul) -> tuple[Tensor, Tensor]:
    """Y·E and E·Z as one product of 2B matrices: [Y, E] by [E, Z], both views of one copy."""
    num_blocks = Y.shape[0]
    stacked = matmul.round(torch.cat((Y, E, Z)))
    products = matmul(stacked[: 2 * num_blocks], stacked[num_blocks:])
    return products[:num_blocks], products[num_blocks:]
