"""A^(-1/p) by a minimax polynomial in a few squares, and no host sync.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from dash_shampoo.base import RootInvConfig
from dash_shampoo.inverse_root.blocks import (
    constants,
    diagonal,
    per_block,
    power,
    scaled,
    stacks_like,
)
from dash_shampoo.inverse_root.fields import check_choice, check_field, is_int, is_number
from dash_shampoo.inverse_root.minimax.rounding import Precision, resolved
from dash_shampoo.inverse_root.minimax.tables import Table, find_table, lower_end
from dash_shampoo.inverse_root.scaling import trace_bound
from dash_shampoo.inverse_root.solver import Solution, Solver
from dash_shampoo.products import MatmulPrecision, Products, norm_parts

# Stacks that rounding the operands of a product takes, on a CPU that emulates it.
_ROUNDING_STACKS = {"auto": 0, "fp32": 0, "fp16x3": 6, "tf32": 5, "fp16": 4, "bf16": 4}


@dataclass(kw_only=True)
class MinimaxConfig(RootInvConfig):
    """One minimax polynomial of the stack by k squarings; no sync.

    The polynomial has the least worst relative error over [λ_max·relative_epsilon, λ_max], so the
    accuracy is known in advance and the same for every factor matrix. Choose this for speed: 8 products for
    root 4 and 9 for root 2, at a relative damping of 1e-4 and an accuracy of about 1 %, where ten steps of
    Newton-DB take 54 and 27; half as many are enough for training in the project's studies. All its products
    are squares. Roots 1, 2, 8/3, 3, 4, 6, 8 and 10.

    The damping is *relative*: the result is (A + (epsilon + relative_epsilon·λ̂)·I)^(-1/root), with λ̂
    the bound of `TraceScaling` on λ_max and `epsilon` the absolute damping of the optimizer, which is
    added as with every solver. In an ill-conditioned factor matrix, eigenvalues below
    relative_epsilon·λ̂ are lifted to it; an absolute damping such as 1e-12 alone would invert them to
    whatever rounding has made of them. A factor matrix of zeros gives epsilon^(-1/root)·I, and I with
    epsilon = 0.

    Attributes:
        accuracy (float): Largest relative error of an eigenvalue of the root, before rounding. The
            fewest squarings that reach it are taken. In (0, 1). (Default: 0.015)
        num_squarings (int | None): k, instead of `accuracy`: a stated cost, with the accuracy that it
            gives. From 3 to 16. (Default: None)
        relative_epsilon (float | None): Damping relative to λ̂, in [1e-8, 0.1]. None is 1e-4 for
            roots up to 2 and 1e-6 for larger ones, which need a smaller damping. (Default: None)
        matmul_precision (MatmulPrecision | "auto"): Precision of the products. "auto" is the fastest that
            adds at most half of the polynomial's error to the root, by a table, where squares are one kernel
            (CUDA and Triton), and "fp32" elsewhere. With the default accuracy,
            "fp16x3" gives the root of "fp32" at every damping; "tf32" and "fp16" do so for full-rank
            factor matrices down to a relative damping of 1e-4; "bf16" is for 1e-3. (Default: "fp32")
        margin (float): How far, relatively, the polynomial may be used beyond λ̂ before it grows
            without bound; it covers rounding. In [1e-3, 0.5]. (Default: 0.02)
    """

    accuracy: float = 0.015
    num_squarings: int | None = None
    relative_epsilon: float | None = None
    matmul_precision: Precision = "fp32"
    margin: float = 0.02

    def __post_init__(self) -> None:
        is_accuracy = is_number(self.accuracy) and 0.0 < self.accuracy < 1.0
        check_field(self, "accuracy", is_accuracy, "in (0, 1)")
        is_count = self.num_squarings is None or (
            is_int(self.num_squarings) and 3 <= self.num_squarings <= 16
        )
        check_field(self, "num_squarings", is_count, "an integer from 3 to 16, or None")
        is_epsilon = self.relative_epsilon is None or (
            is_number(self.relative_epsilon) and 1e-8 <= self.relative_epsilon <= 0.1
        )
        check_field(self, "relative_epsilon", is_epsilon, "in [1e-8, 0.1], or None")
        check_choice(self, "matmul_precision", MatmulPrecision, "auto")
        is_margin = is_number(self.margin) and 1e-3 <= self.margin <= 0.5
        check_field(self, "margin", is_margin, "in [1e-3, 0.5]")


def table_of(config: MinimaxConfig, root: Fraction) -> Table:
    """The polynomial that a config stands for.

    Args:
        config: The config.
        root: p of A^(-1/p).

    Returns:
        The table, with its error and its number of products; a look-up of microseconds.

    Raises:
        ValueError: If no table serves; says which is the nearest.

    Examples:
        >>> table = table_of(MinimaxConfig(relative_epsilon=1e-4), Fraction(4))
        >>> table.num_squarings, table.error < 0.012
        (8, True)
    """
    return find_table(
        root,
        _relative_epsilon(config, root),
        config.margin,
        config.accuracy,
        config.num_squarings,
    )


def _relative_epsilon(config: MinimaxConfig, root: Fraction) -> float:
    if config.relative_epsilon is not None:
        return config.relative_epsilon
    return 1e-4 if root <= 2 else 1e-6


@dataclass(frozen=True)
class _Coefficients:
    """A ladder for M = T + dI, its second rung divided by its factor of T.

    Attributes:
        lower (float): d, the smallest eigenvalue of M.
        first (float): S_2 = M + first·t²·A² + constant·I for T = t·A.
        constant (float): See there.
        rungs (tuple): (a, b, c) of S_3 … S_k.
        weights (tuple): Of M, S_2, …, S_k in the sum.
        shift (float): Of I in the sum.
        last (float): Of S_k².
    """

    lower: float
    first: float
    constant: float
    rungs: tuple[tuple[float, float, float], ...]
    weights: tuple[float, ...]
    shift: float
    last: float


@lru_cache(maxsize=256)
def _coefficients(table: Table, relative_epsilon: float, margin: float) -> _Coefficients:
    """The ladder of a table in the form that takes the fewest passes.

    a·M² + b·M + c with M = T + dI is a·T² + β·T + (a·d² + b·d + c), β = 2ad + b. Divided by β it needs one
    fused multiply-add; the next rung takes a·β² for a, and the sum γ_2·β for γ_2.
    """
    d = lower_end(relative_epsilon, margin)
    (a, b, c), *rungs = table.ladder.rungs
    shift, weight, *weights, last = table.ladder.output
    beta = 2.0 * a * d + b
    (a_3, b_3, c_3), *others = rungs
    return _Coefficients(
        lower=d,
        first=a / beta,
        constant=(a * d**2 + b * d + c) / beta - d,
        rungs=((a_3 * beta**2, b_3, c_3), *others),
        weights=(weight, weights[0] * beta, *weights[1:]),
        shift=shift,
        last=last,
    )


def minimax(
    A: Tensor, root: Fraction, config: MinimaxConfig, epsilon: float, divisor: float | Tensor = 1.0
) -> Solution:
    """(A + δI)^(-1/p) = c^(1/p)·f(M), M = c(A + δI), f ≈ x^(-1/p) on [l, 1] by k squarings.

    δ = epsilon + relative_epsilon·λ̂ and c = 1/(λ̂(1 + relative_epsilon)(1 + margin)), with λ̂ the bound of
    `trace_bound` on the largest eigenvalue of A + epsilon·I. It comes from the square of that matrix, which
    is also the first product of f, so it costs none. The eigenvalues of M then lie in [l, 1/(1 + margin)],
    l = relative_epsilon/((1 + relative_epsilon)(1 + margin)), for every A; so f, a `Ladder`, is known in
    advance.

    The relative error of each eigenvalue of the root is at most the error of the table, plus
    rounding: a relative perturbation u of A's large eigenvalues moves the small ones by
    u/relative_epsilon, so fp32 ends at about 1e-5 for a relative damping of 1e-4, and at 1e-3 for
    1e-6. An eigenvalue of A below -δ, far from rounding, makes the result grow: `sketched_residual`
    finds it.

    Args:
        A: (B, N, N) stack, float32 or float64. Not modified.
        root: p, one of the tables'.
        config: Accuracy or number of squarings, relative damping, precision of the products.
        epsilon: Absolute damping, at least 0; the relative one is added to it.
        divisor: A/divisor is meant with A; a number, or a scalar on the device. Default: 1.

    Returns:
        Roots times c^(-1/p); damping = δ. A block of zeros gives about epsilon^(-1/p)·I, and about I with
        epsilon = 0.

    Note:
        k matmuls, all of them squares, and two passes beside them; where the squares are not fused, a norm
        and the division of A are two more, the sum of the rungs and the scale two, and on a device each rung
        copies M.
        Where they are and the divisor is on the device, damping A is one more.
        No host sync. The workspace is k stacks beside the root.

    References:
        Polar Express, arXiv 2505.16932 (minimax polynomials, composed with each other and for the
        sign function); Paterson and Stockmeyer, SIAM J. Comput. 2 (1973), and Sastre, Linear Algebra
        and its Applications 539 (2018), on polynomials with few products.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 1e-2], dtype=torch.float64))[None]
        >>> solution = minimax(A, Fraction(2), MinimaxConfig(accuracy=1e-3), 0.0)
        >>> [round(x, 1) for x in (solution.X * solution.scale)[0].diagonal().tolist()]
        [1.0, 9.9]
    """
    table = table_of(config, root)
    relative_epsilon = _relative_epsilon(config, root)
    poly = _coefficients(table, relative_epsilon, config.margin)
    products = Products(resolved(config.matmul_precision, A, table.error, relative_epsilon))
    k = table.num_squarings
    (flat, basis), X = stacks_like(A, k), torch.empty_like(A)

    # A is divided by about its trace first: A of 1e±30 neither overflows nor vanishes in its fourth power.
    # Numbers per block are float64. The root of A/d is that of A with d times the damping, but for its scale.
    M, square, dtype, shift = basis[0], X, A.dtype, divisor * epsilon if epsilon > 0.0 else 0.0
    n, is_fused = A.shape[-1], products.can_fuse(A)
    trace_B = diagonal(A).sum(-1, dtype=torch.float64)
    if epsilon > 0.0:
        trace_B.add_(n * shift)
    size_B = trace_B.abs().clamp_min_(n * torch.finfo(dtype).tiny)
    inverse_B = power(size_B, -1.0, dtype)
    parts = None
    if is_fused:
        parts, offsets_B = norm_parts(A), inverse_B * shift if epsilon > 0.0 else None
        products.square(A, factors=inverse_B, offsets=offsets_B, norms=parts, out=square)
    else:
        scaled(A, inverse_B, inverse_B, shift, out=M)
        products.square(M, out=square)
    bound_B = trace_bound(trace_B, inverse_B, square, parts)
    # A negative definite A has bound 0; dividing by it makes the result infinite, as it should be.
    stretch_B = (bound_B * ((1.0 + relative_epsilon) * (1.0 + config.margin))).reciprocal_()
    is_zero_B = (trace_B == 0.0) & (bound_B == 0.0)
    stretch_B.masked_fill_(is_zero_B, 1.0)
    if is_fused:
        inverse_B = (stretch_B * inverse_B).to(dtype)
        scaled(A, inverse_B, inverse_B, shift, out=M)
    else:
        M.mul_(per_block(stretch_B.to(dtype)))
    diagonal(M).add_(poly.lower)
    factor_B = (poly.first * stretch_B.square()).to(dtype)
    torch.addcmul(M, square, per_block(factor_B), out=basis[1])
    diagonal(basis[1]).add_(poly.constant)

    if isinstance(divisor, Tensor) or divisor != 1.0:
        size_B.div_(divisor)
    damping_B = relative_epsilon * bound_B * size_B + epsilon
    scale_B = (stretch_B / size_B).masked_fill_(is_zero_B, poly.lower)
    scale_B = scale_B.pow_(1.0 / float(root)).to(dtype)
    _climb(flat, basis, X, poly, products, scale_B if is_fused else None)
    return Solution(
        X,
        damping=damping_B.masked_fill_(is_zero_B, 1.0).to(dtype),
        size=damping_B,
        scale=None if is_fused else scale_B,
        # Products of a matrix by itself are symmetric up to their rounding.
        is_symmetric=True,
    )


def _climb(
    flat: Tensor,
    basis: list[Tensor],
    X: Tensor,
    poly: _Coefficients,
    products: Products,
    scale_B: Tensor | None,
) -> None:
    """Write f(M), times a scale, to X.

    Args:
        flat: (k, B·N·N) workspace, so that one pass, or the last product, sums the rungs.
        basis: Its k stacks (B, N, N), the first two of which hold M and S_2.
        X: (B, N, N) is overwritten.
        poly: f.
        products: Products.
        scale_B: (B,) factors of the results, where they cost no pass. Default: 1.
    """
    M = basis[0]
    for j, (a, b, c) in enumerate(poly.rungs, start=2):
        products.square(basis[j - 1], alpha=a, addend=M, beta=b, shift=c, out=basis[j])
    weights = constants(poly.weights, M.dtype, M.device)
    products.square(
        basis[-1],
        alpha=poly.last,
        addend=flat,
        beta=weights,
        shift=poly.shift,
        scale=scale_B,
        out=X,
    )


SOLVER = Solver(
    solve=minimax,
    # M and the rungs, beside the root; operands that are rounded.
    workspace=lambda config, root: (
        table_of(config, root).num_squarings + _ROUNDING_STACKS[config.matmul_precision]
    ),
    check=table_of,
    error=lambda config, root: table_of(config, root).error,
    divides=True,
)
