"""Newton-Schulz iteration for roots that are powers of two: polynomials of degree five, a fixed list of them.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.blocks import frobenius_norm, power, scaled
from dash_shampoo.inverse_root.fields import check_field, is_number
from dash_shampoo.inverse_root.solver import Solution, Solver
from dash_shampoo.inverse_root.square_root import Coefficients, square_root
from dash_shampoo.products import Products

_MAX_PASSES = 6
# Steps are left out where the others alone come to 1 within this, far below the rounding of their products.
_NEGLIGIBLE = 1e-12
_NUM_POINTS = 64

DEFAULT_COEFFICIENTS: Coefficients = (
    (4.13128391, -11.55333042, 8.08213853),
    (4.12541632, -11.50684624, 8.04353601),
    (4.10115961, -11.3160133, 7.88520944),
    (4.00113706, -10.55155713, 7.25350491),
    (3.60866153, -7.8859981, 5.08966931),
    (2.60316664, -3.17091014, 1.53861587),
    (1.90616448, -1.31144684, 0.40517076),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)
"""Each the minimax polynomial for 1 on what the ones before leave of [5e-4, 1], up to 1.03 so that rounding
can't carry an eigenvalue out of it, divided by its largest value. The last two are the Taylor
polynomial at 1, which corrects those divisions and rounding: what it is given is within 1.3e-4 of 1, and
e goes to 2.5·e³."""


@dataclass(kw_only=True)
class NewtonSchulzRootInvConfig(RootInvConfig):
    """Coupled Newton-Schulz iteration x ← a·x + b·x³ + c·x⁵ for roots 2, 4, 8, …; no sync.

    Choose this to have a result of a fixed number of products for ill-conditioned factor matrices
    without the tables of `MinimaxConfig`. Its coefficients are one polynomial for each step, the best
    for what the steps before have left of the interval [10^-3, 1] of the square roots of the eigenvalues;
    so it reaches a condition number of 1e6, the inverse of `relative_epsilon`.

    Attributes:
        coefficients (tuple[tuple[float, float, float], ...]): (a, b, c) of each step, at least one; from
            p = 4 on, the second pass and those after it leave out the first steps where they are not
            needed. (Default: DEFAULT_COEFFICIENTS)
        relative_epsilon (float): The damping is max(epsilon, relative_epsilon·‖A‖_F). In [0, 1].
            (Default: 1e-6)
        disable_tf32 (bool): Whether products are fp32 although the program allows TF32. (Default: True)
    """

    coefficients: Coefficients = field(default_factory=lambda: DEFAULT_COEFFICIENTS)
    relative_epsilon: float = 1e-6
    disable_tf32: bool = True

    def __post_init__(self) -> None:
        is_list = isinstance(self.coefficients, (tuple, list)) and len(self.coefficients) > 0
        check_field(
            self,
            "coefficients",
            is_list
            and all(len(step) == 3 and all(map(is_number, step)) for step in self.coefficients),
            "a sequence of triples of numbers (a, b, c), at least one",
        )
        is_epsilon = is_number(self.relative_epsilon) and 0.0 <= self.relative_epsilon <= 1.0
        check_field(self, "relative_epsilon", is_epsilon, "in [0, 1]")
        check_field(self, "disable_tf32", isinstance(self.disable_tf32, bool), "True or False")


def check(config: NewtonSchulzRootInvConfig, root: Fraction) -> None:
    """Refuse a root that repeated square roots don't reach.

    Args:
        config: Unused; part of the signature of every check.
        root: p of A^(-1/p).

    Raises:
        ValueError: If the root is not 2, 4, 8, … up to 64.
    """
    if root not in [2**k for k in range(1, _MAX_PASSES + 1)]:
        raise ValueError(
            f"root={root} is not one of 2, 4, 8, … 64, the roots of NewtonSchulzRootInvConfig; EigenConfig "
            "and ChebyshevConfig take any root."
        )


def newton_schulz(
    A: Tensor, root: Fraction, config: NewtonSchulzRootInvConfig, epsilon: float
) -> Solution:
    """A^(-1/p), p = 2^k, by W = Z·Y, P = aI + bW + cW², Y ← Y·P, Z ← P·Z from Y_0 = A/s, Z_0 = I.

    The square root x of an eigenvalue of W goes to a·x + b·x³ + c·x⁵ in every step, and to 1 in the end;
    then Y = (A/s)^(1/2) and Z = (A/s)^(-1/2). p = 4 takes the square root first and then its inverse
    square root, and so on; a square root has no small eigenvalues, so that the later passes need fewer steps.
    s = ‖A‖_F + δ√N, at least ‖A + δI‖_F, is a bound of λ_max, so x starts in (0, 1].

    Args:
        A: (B, N, N) stack, float32 or float64. Not modified.
        root: 2, 4, 8, … 64.
        config: Coefficients and relative damping.
        epsilon: Absolute damping, at least 0; δ = max(epsilon, relative_epsilon·‖A‖_F).

    Returns:
        Roots times s^(1/p), symmetric up to rounding. A block of zeros with epsilon = 0 gives a finite
        multiple of the identity.

    Note:
        4 matmuls a step, 2 less in the first, where Z = I, and one less in the last, where only Y or
        only Z is still needed: 33 for nine steps and p = 2, 54 for nine and six and p = 4. No host sync.

    References:
        Higham, Functions of Matrices, section 6.7 and theorem 5.2 (from sign iterations to coupled square
        roots); the choice of coefficients: Polar Express, arXiv 2505.16932. The interface is that of
        Distributed Shampoo's config of this name.

    Examples:
        >>> A = torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64))[None]
        >>> solution = newton_schulz(A, Fraction(2), NewtonSchulzRootInvConfig(relative_epsilon=0.0), 0.0)
        >>> [round(x, 6) for x in (solution.X * solution.scale)[0].diagonal().tolist()]
        [0.5, 0.25]
    """
    products = Products.with_tf32(A, is_wanted=not config.disable_tf32)
    norm_B = frobenius_norm(A)
    damping_B = (config.relative_epsilon * norm_B).clamp_min(epsilon)
    s_B = norm_B.add_(damping_B, alpha=A.shape[-1] ** 0.5)
    s_B = torch.threshold(s_B, torch.finfo(A.dtype).tiny, 1.0)
    Y = scaled(A, power(s_B, -1.0, A.dtype), damping_B / s_B)
    steps = tuple((a, b, c) for a, b, c in config.coefficients)
    passes = _passes(steps, config.relative_epsilon, A.shape[-1], root)
    for coefficients in passes[:-1]:
        Y = square_root(Y, coefficients, products, is_inverse=False)
    Z = square_root(Y, passes[-1], products, is_inverse=True)
    return Solution(
        Z,
        damping=damping_B.to(A.dtype),
        scale=power(s_B, -1.0 / root.numerator, A.dtype),
        size=s_B,
        iterations=sum(map(len, passes)),
    )


@lru_cache(maxsize=64)
def _passes(
    coefficients: Coefficients, relative_epsilon: float, size: int, root: Fraction
) -> tuple[Coefficients, ...]:
    """The steps of each pass.

    Args:
        coefficients: (a, b, c) of each step of the first pass.
        relative_epsilon: r, at most δ/‖A‖_F, so that λ_min/s is at least r/(1 + r·√N).
        size: N.
        root: 2^k.

    Returns:
        k runs of steps. The first is `coefficients`; from each other the leading steps are left out for as
        long as the error is no larger for it on all x that the pass can be given.
    """
    # Half of what damping leaves: rounding may have made A indefinite.
    smallest = 0.5 * relative_epsilon / (1.0 + relative_epsilon * size**0.5)
    passes = [coefficients]
    # Of no damping nothing follows: the error is 1 for either run.
    allowed = max(min(_error(coefficients, smallest**0.5), 1.0), _NEGLIGIBLE)
    for number in range(2, root.numerator.bit_length()):
        steps = coefficients
        while len(steps) > 1 and _error(steps[1:], smallest ** (0.5**number)) < allowed:
            steps = steps[1:]
        passes.append(steps)
    return tuple(passes)


def _error(coefficients: Coefficients, smallest: float) -> float:
    """The largest |1 - f(x)| over x in [smallest, 1] of all steps in a row; at least 1 for smallest = 0."""
    errors = []
    for number in range(_NUM_POINTS):
        x = smallest ** (number / (_NUM_POINTS - 1))
        for a, b, c in coefficients:
            square = x * x
            x *= a + square * (b + square * c)
        errors.append(abs(1.0 - x))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


SOLVER = Solver(
    solve=newton_schulz,
    # Y, Z, W, P, and the product that becomes the next of them, less the root itself.
    workspace=lambda config, root: 5,
    check=check,
)
