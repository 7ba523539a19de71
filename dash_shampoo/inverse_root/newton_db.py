"""Newton-Denman-Beavers iteration for the roots 2, 4 and 8, a fixed number of steps.

Shape suffixes: A_BNN is a stack of B blocks of N×N.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.blocks import power, scaled
from dash_shampoo.inverse_root.fields import check_positive_int
from dash_shampoo.inverse_root.scaling import ScaledConfig, compute_scale
from dash_shampoo.inverse_root.solver import Solution, Solver
from dash_shampoo.inverse_root.square_root import square_root
from dash_shampoo.products import Products

_PASSES = {2: 1, 4: 2, 8: 3}
# E = (3I - Z·Y)/2.
_STEP = (1.5, -0.5, 0.0)


@dataclass(kw_only=True)
class NewtonDBConfig(ScaledConfig, RootInvConfig):
    """Newton-Denman-Beavers iteration for the roots 2, 4 and 8: a fixed number of steps, no sync.

    Root 2 is one pass, root 4 two passes (the square root, then its inverse square root), root 8
    three. Choose this to reproduce DASH. Ten steps converge up to a condition number of about
    1e3; beyond it, one pass acts as a damping of about 2.5e-4·s, but two passes over-invert the
    small eigenvalues. Half precision diverges on real factor matrices.

    Attributes:
        num_iterations (int): Steps of each pass, at least 1. (Default: 10)
        scaling (ScalingConfig): How s is found. (Default: FrobeniusScaling())
        matmul_precision (MatmulPrecision): Precision of the products. (Default: "fp32")
    """

    num_iterations: int = 10

    def __post_init__(self) -> None:
        check_positive_int(self, "num_iterations")
        super().__post_init__()


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


def newton_db(A: Tensor, root: Fraction, config: NewtonDBConfig, epsilon: float) -> Solution:
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
        config: Steps, scale, precision of the products.
        epsilon: Damping, at least 0.

    Returns:
        Roots times s^(1/p), symmetric up to rounding; iterations = the steps of all passes. A block of
        zeros with epsilon = 0 gives a finite multiple of the identity.

    Note:
        Per pass 1 matmul in the first step, 3 in each later one, and one less in the last step,
        where only Y or only Z is still needed: 3·num_iterations - 3, so 27 / 54 / 81 for ten
        steps and p = 2 / 4 / 8. None is symmetric by structure. No host sync.

    References:
        DASH, arXiv 2602.02016, Newton-DB; Higham, Functions of Matrices, section 6.3 and equation
        (6.35); Denman and Beavers, Appl. Math. Comput. 2 (1976).

    Examples:
        >>> import torch
        >>> A = torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64))[None]
        >>> solution = newton_db(A, Fraction(2), NewtonDBConfig(), 0.0)
        >>> [round(x, 6) for x in (solution.X * solution.scale)[0].diagonal().tolist()]
        [0.5, 0.25]
    """
    products = Products(config.matmul_precision)
    s_B = compute_scale(A, config.scaling, epsilon)
    num_passes = _PASSES[root.numerator]
    inverse_B = power(s_B, -1.0, A.dtype)
    Y = scaled(A, inverse_B, inverse_B, epsilon)
    steps = (_STEP,) * config.num_iterations
    for _ in range(num_passes - 1):
        Y = square_root(Y, steps, products, is_inverse=False)
    Z = square_root(Y, steps, products, is_inverse=True)
    return Solution(
        Z,
        damping=epsilon,
        scale=power(s_B, -1.0 / root.numerator, A.dtype),
        size=s_B,
        iterations=num_passes * config.num_iterations,
    )


SOLVER = Solver(
    solve=newton_db,
    # Y, Z, E and the product that becomes the next of them, beside the root; operands that are rounded.
    workspace=lambda config, root: 4 if config.matmul_precision == "fp32" else 8,
    check=check,
)
