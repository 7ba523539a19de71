"""A^(-1/p) by minimax polynomials: one squaring ladder, or a chain of them, and no host sync.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.config import MinimaxConfig
from dash_shampoo.inverse_root.blocks import diagonal, per_block, rescaled_symmetric
from dash_shampoo.inverse_root.ladder import Ladder
from dash_shampoo.inverse_root.matmul import Matmul, MatmulCounter
from dash_shampoo.inverse_root.minimax_plan import Chain, plan_chain
from dash_shampoo.inverse_root.result import InverseRootResult, make_result
from dash_shampoo.inverse_root.scaling import trace_bound

# square_plus(a, b, c, out) writes a·M² + b·M + c·I.
_SquarePlus = Callable[[float, float, float, Tensor], None]


def chain_of(config: MinimaxConfig, root: Fraction) -> Chain:
    """The polynomials that a config stands for.

    Args:
        config: The config.
        root: p of A^(-1/p).

    Returns:
        The chain, with its error and its number of matmuls; computed once and kept.

    Raises:
        ValueError: If no chain reaches the accuracy, or a chain of several polynomials is asked for
            with a root that is not an integer.

    Examples:
        >>> chain = chain_of(MinimaxConfig(relative_epsilon=1e-4), Fraction(4))
        >>> chain.num_matmuls, chain.error < 0.012
        (8, True)
    """
    epsilon = config.relative_epsilon
    if epsilon is None:
        epsilon = 1e-4 if root <= 2 else 1e-6
    degrees = None
    if config.chain is not None:
        degrees = tuple(int(str(degree).removesuffix("s")) for degree in config.chain)
    return plan_chain(root, epsilon, config.margin, config.accuracy, degrees)


def check(config: MinimaxConfig, root: Fraction) -> None:
    """Refuse what no chain can do; computes the chain where it is not in the tables.

    Args:
        config: Accuracy, damping and chain.
        root: p of A^(-1/p).

    Raises:
        ValueError: As of `chain_of`.
    """
    chain_of(config, root)


def minimax(A: Tensor, root: Fraction, config: MinimaxConfig, epsilon: float) -> InverseRootResult:
    """(A + δI)^(-1/p) = c^(1/p)·f(M), M = c(A + δI), f ≈ x^(-1/p) on [l, 1] by k squarings.

    δ = epsilon + relative_epsilon·λ̂ and c = 1/((λ̂ + δ)(1 + margin)), with λ̂ the bound of
    `trace_bound`. It comes from A², which is also the first product of f, so it costs none. The
    eigenvalues of M then lie in [l, 1/(1 + margin)], l = relative_epsilon/((1 + relative_epsilon)
    (1 + margin)), for every A; so f is known in advance. It is a `Ladder`, or for an explicit chain

        X ← T_1(M);  M ← T_j(M)^p M;  X ← X·T_(j+1)(M)

    The relative error of each eigenvalue of the root is at most the error of the chain, plus
    rounding: a relative perturbation u of A's large eigenvalues moves the small ones by
    u/relative_epsilon, so fp32 ends at about 1e-5 for a relative damping of 1e-4, and at 1e-3 for
    1e-6. An eigenvalue of A below -δ, far from rounding, makes the result grow: `sketched_residual`
    finds it.

    Args:
        A: (B, N, N) stack, finite, float32 or float64. Not modified.
        root: p, any positive number for a single polynomial.
        config: Accuracy, relative damping, chain, precision of the products.
        epsilon: Absolute damping, at least 0; the relative one is added to it.

    Returns:
        Roots, exactly symmetric; iterations = 0; no residual; damping = δ. A block of zeros gives
        about epsilon^(-1/p)·I, and about I with epsilon = 0.

    Note:
        k matmuls for a ladder, all symmetric by structure. A chain of m polynomials takes
        Σk_j + 3(m-1) for p = 2 and Σk_j + 4(m-1) for p = 4. No host sync. The workspace is k + 2
        stacks.

    References:
        Polar Express, arXiv 2505.16932 (minimax polynomials composed with each other, there for the
        sign function); Paterson and Stockmeyer, SIAM J. Comput. 2 (1973), and Sastre, Linear Algebra
        and its Applications 539 (2018), on polynomials with few products.

    Examples:
        >>> A = torch.diag(torch.tensor([1.0, 1e-2], dtype=torch.float64))[None]
        >>> result = minimax(A, Fraction(2), MinimaxConfig(accuracy=1e-3), 0.0)
        >>> [round(x, 1) for x in result.value[0].diagonal().tolist()], result.num_matmuls
        ([1.0, 9.9], 11.0)
    """
    chain = chain_of(config, root)
    counter = MatmulCounter(num_blocks=A.shape[0])
    products = _products(config, counter)
    first = chain.ladders[0]
    basis = _workspace(A, max(first.num_matmuls, 2))
    scaled = _ScaledStack(A, epsilon, chain, basis, next(products))
    M, X = scaled.M, None
    square_plus: _SquarePlus = scaled.square_plus
    for i, ladder in enumerate(chain.ladders):
        if i > 0:
            basis = _workspace(M, max(ladder.num_matmuls, 1))
            basis[0].copy_(M)
            square_plus = _square_plus(M, products)
        T = _evaluate(ladder, basis, square_plus, products)
        X = T if X is None else next(products)(X, T)
        if i + 1 < len(chain.ladders):
            M = _contract(basis[0], T, root.numerator, products)
    assert X is not None
    return make_result(
        rescaled_symmetric(X, scaled.factor_B, 1.0 / float(root)),
        damping=scaled.damping_B.to(A.dtype),
        num_matmuls=counter.total,
        num_symmetric_matmuls=counter.symmetric,
    )


def _products(config: MinimaxConfig, counter: MatmulCounter) -> Iterator[Matmul]:
    """The products at their precisions, one after the other; the last precision stays."""
    precisions = config.matmul_precision
    if isinstance(precisions, str):
        precisions = (precisions,)
    for precision in precisions:
        matmul = Matmul(precision, counter)
        yield matmul
    while True:
        yield matmul


def _workspace(A: Tensor, count: int) -> Tensor:
    """(count, B, N, N) uninitialised stacks in one piece of memory, so that one pass can sum them."""
    return A.new_empty((count, *A.shape))


class _ScaledStack:
    """M = c(A + δI) in the first stack of the workspace, and what c and δ are.

    Args:
        A: (B, N, N) stack.
        epsilon: Absolute damping.
        chain: Relative damping and margin.
        basis: (2 or more, B, N, N) workspace. The first stack becomes M, the second c₀²A².
        matmul: For the one product.

    Attributes:
        M (Tensor): (B, N, N).
        factor_B (Tensor): c; the root of A + δI is c^(1/p) times that of M.
        damping_B (Tensor): δ.
    """

    def __init__(
        self, A: Tensor, epsilon: float, chain: Chain, basis: Tensor, matmul: Matmul
    ) -> None:
        # In float64, and A itself divided by about its trace: A of 1e±30 neither overflows nor
        # vanishes in its fourth power.
        size = A.shape[-1]
        scale_B = diagonal(A).sum(-1, dtype=torch.float64).abs() + size * epsilon
        scale_B = scale_B.clamp_min(torch.finfo(A.dtype).tiny)
        M, self._square = basis[0], basis[1]
        torch.mul(A, per_block((1.0 / scale_B).to(A.dtype)), out=M)
        matmul.square(M, out=self._square)
        bound_B = trace_bound(M, self._square)
        damping_B = epsilon / scale_B + chain.relative_epsilon * bound_B
        total_B = (bound_B + damping_B) * (1.0 + chain.margin)
        # Nothing at all, or (total = 0 < ‖A‖) no positive semi-definite matrix: NaN stays NaN.
        is_zero_B = (total_B == 0.0) & (diagonal(self._square).sum(-1) == 0.0)
        total_B = total_B.masked_fill(is_zero_B, 1.0 + chain.margin)
        damping_B = damping_B.masked_fill(is_zero_B, 1.0)
        scale_B = scale_B.masked_fill(is_zero_B, 1.0)
        stretch_B, shift_B = 1.0 / total_B, damping_B / total_B
        M.mul_(per_block(stretch_B.to(A.dtype)))
        diagonal(M).add_(shift_B.to(A.dtype)[:, None])
        self.M = M
        self._square_factor_B = stretch_B.square()
        self._shift_B = shift_B
        self.factor_B = (stretch_B / scale_B).to(A.dtype)
        self.damping_B = damping_B * scale_B

    def square_plus(self, a: float, b: float, c: float, out: Tensor) -> None:
        """Write a·M² + b·M + c·I without a product: M = tA' + dI, so M² = t²A'² + 2dM - d²I."""
        dtype, d_B = out.dtype, self._shift_B
        torch.mul(self._square, per_block((a * self._square_factor_B).to(dtype)), out=out)
        out.addcmul_(self.M, per_block((2.0 * a * d_B + b).to(dtype)))
        diagonal(out).add_((c - a * d_B.square()).to(dtype)[:, None])


def _square_plus(M: Tensor, products: Iterator[Matmul]) -> _SquarePlus:
    """What writes a·M² + b·M + c·I by a product."""

    def square_plus(a: float, b: float, c: float, out: Tensor) -> None:
        next(products).square(M, alpha=a, addend=M, beta=b, out=out)
        diagonal(out).add_(c)

    return square_plus


def _evaluate(
    ladder: Ladder, basis: Tensor, square_plus: _SquarePlus, products: Iterator[Matmul]
) -> Tensor:
    """f(M) of a ladder.

    Args:
        ladder: f.
        basis: (k or more, B, N, N) workspace whose first stack is M; the rungs fill the others.
        square_plus: Writes a·M² + b·M + c·I.
        products: Each next one is used once.

    Returns:
        (B, N, N) new stack.
    """
    M, k, output = basis[0], ladder.num_matmuls, ladder.output
    X = torch.empty_like(M)
    if k == 0:
        torch.mul(M, output[1], out=X)
        diagonal(X).add_(output[0])
        return X
    if k == 1:
        square_plus(output[2], output[1], output[0], X)
        return X
    square_plus(*ladder.rungs[0], basis[1])
    for j, (a, b, c) in enumerate(ladder.rungs[1:], start=1):
        next(products).square(basis[j], alpha=a, addend=M, beta=b, out=basis[j + 1])
        diagonal(basis[j + 1]).add_(c)
    weights = torch.tensor(output[1:-1], dtype=M.dtype, device=M.device)
    torch.mv(basis[:k].view(k, -1).mT, weights, out=X.view(-1))
    diagonal(X).add_(output[0])
    return next(products).square(basis[k - 1], alpha=output[-1], addend=X, out=X)


def _contract(M: Tensor, T: Tensor, root: int, products: Iterator[Matmul]) -> Tensor:
    """T^p·M, which is nearer to I than M; (U·M)·U with U = T^(p/2) for an even p."""
    if root % 2 == 0:
        U = _power(T, root // 2, products)
        return next(products)(next(products)(U, M), U, is_symmetric=True)
    return next(products)(_power(T, root, products), M)


def _power(T: Tensor, exponent: int, products: Iterator[Matmul]) -> Tensor:
    """T^exponent, each product at its own precision."""
    result = T
    for bit in bin(exponent)[3:]:
        result = next(products)(result, result, is_symmetric=True)
        if bit == "1":
            result = next(products)(result, T, is_symmetric=True)
    return result
