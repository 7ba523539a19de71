"""A^(-1/p) by minimax polynomials: one squaring ladder, or a chain of them, and no host sync.

Shape suffixes: A_BNN is a stack of B blocks of N×N; s_B holds one number per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from dash_shampoo.config import MinimaxConfig
from dash_shampoo.inverse_root.blocks import diagonal, per_block, rescaled_symmetric
from dash_shampoo.inverse_root.ladder import Ladder
from dash_shampoo.inverse_root.matmul import Matmul, MatmulCounter
from dash_shampoo.inverse_root.minimax_plan import Chain, plan_chain
from dash_shampoo.inverse_root.result import (
    InverseRootResult,
    concatenate_results,
    make_result,
)
from dash_shampoo.inverse_root.scaling import trace_bound

# On the CPU the workspace of a chunk should stay in the cache, and in memory that malloc reuses.
_MAX_CHUNK_BYTES = 2**21

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
    if A.device.type == "cpu":
        rows = max(_MAX_CHUNK_BYTES // (A.shape[-1] ** 2 * A.element_size()), 1)
        starts = range(0, A.shape[0], rows)
        return concatenate_results(
            [_solve(A[i : i + rows], root, config, epsilon, chain) for i in starts]
        )
    return _solve(A, root, config, epsilon, chain)


def _solve(
    A: Tensor, root: Fraction, config: MinimaxConfig, epsilon: float, chain: Chain
) -> InverseRootResult:
    """The roots of a stack that is small enough for the workspace."""
    counter = MatmulCounter(num_blocks=A.shape[0])
    products = _products(config, counter)
    basis = _workspace(A, max(chain.ladders[0].num_matmuls, 2))
    square_plus, factor_B, damping_B = _scale(A, epsilon, chain, basis, next(products))
    T = X = _evaluate(chain.ladders[0], basis, square_plus, products)
    for ladder in chain.ladders[1:]:
        M = _contract(basis[0], T, root.numerator, products)
        basis = _workspace(M, max(ladder.num_matmuls, 1))
        basis[0].copy_(M)
        T = _evaluate(ladder, basis, _square_plus(M, products), products)
        X = next(products)(X, T)
    return make_result(
        rescaled_symmetric(X, factor_B, 1.0 / float(root)),
        damping=damping_B,
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


def _scale(
    A: Tensor, epsilon: float, chain: Chain, basis: Tensor, matmul: Matmul
) -> tuple[_SquarePlus, Tensor, Tensor]:
    """Write M = c(A + δI) to the first stack of the workspace; find c and δ by one product.

    Args:
        A: (B, N, N) stack.
        epsilon: Absolute damping.
        chain: Relative damping and margin.
        basis: (2 or more, B, N, N) workspace; the second stack holds the product.
        matmul: For the product.

    Returns:
        What writes a·M² + b·M + c·I, to be called once; c (B,), the root of A + δI being c^(1/p)
        times that of M; and δ (B,).
    """
    # Numbers per block are float64, and A is divided by about its trace first: A of 1e±30 neither
    # overflows nor vanishes in its fourth power.
    dtype, size = A.dtype, A.shape[-1]
    M, square = basis[0], basis[1]
    trace_B = diagonal(A).sum(-1, dtype=torch.float64)
    size_B = (trace_B.abs() + size * epsilon).clamp_min_(torch.finfo(dtype).tiny)
    torch.mul(A, per_block(size_B.reciprocal().to(dtype)), out=M)
    matmul.square(M, out=square)
    bound_B = trace_bound(M, square)
    damping_B = chain.relative_epsilon * bound_B
    if epsilon > 0.0:
        damping_B += epsilon / size_B
    else:
        is_zero_B = (trace_B == 0.0) & (bound_B == 0.0)
        damping_B.masked_fill_(is_zero_B, 1.0)
        size_B.masked_fill_(is_zero_B, 1.0)
    # A negative definite A has bound 0; dividing by it makes the result infinite, as it should be.
    stretch_B = ((bound_B + damping_B) * (1.0 + chain.margin)).reciprocal_()
    shift_B = damping_B * stretch_B
    M.mul_(per_block(stretch_B.to(dtype)))
    diagonal(M).add_(shift_B.to(dtype)[:, None])

    def square_plus(a: float, b: float, c: float, out: Tensor) -> None:
        # M = tA' + dI, so M² = t²A'² + 2dM - d²I.
        factors_3B = torch.stack(
            (a * stretch_B.square(), 2.0 * a * shift_B + b, c - a * shift_B.square())
        ).to(dtype)
        torch.mul(square, per_block(factors_3B[0]), out=out)
        out.addcmul_(M, per_block(factors_3B[1]))
        diagonal(out).add_(factors_3B[2][:, None])

    return square_plus, (stretch_B / size_B).to(dtype), (damping_B * size_B).to(dtype)


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
    rungs, diagonals = basis.unbind(), diagonal(basis).unbind()
    square_plus(*ladder.rungs[0], rungs[1])
    for j, (a, b, c) in enumerate(ladder.rungs[1:], start=1):
        next(products).square(rungs[j], alpha=a, addend=M, beta=b, out=rungs[j + 1])
        diagonals[j + 1].add_(c)
    weights = _weights(output, M.dtype, M.device)
    torch.mv(basis[:k].view(k, -1).mT, weights, out=X.view(-1))
    diagonal(X).add_(output[0])
    return next(products).square(rungs[k - 1], alpha=output[-1], addend=X, out=X)


@lru_cache(maxsize=64)
def _weights(output: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k,) the output coefficients of M and the rungs."""
    return torch.tensor(output[1:-1], dtype=dtype, device=device)


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
