r"""Minimax approximations of x^(-1/p) on [lower, 1], in float64: where the minimax tables come from.

    python -m dash_shampoo.inverse_root.minimax_generator --root 4 --relative-epsilon 1e-4 \
        --num-matmuls 9

searches a ladder and prints its row for `minimax_tables`. P: nodes on the interval, R: candidates
that are improved side by side, n: parameters of one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.inverse_root.ladder import Ladder, nodes

# Exponents of the norms ‖e‖_q whose minima lead to the minimax: the largest is within 1 % of it.
_SEARCH_NORMS = (2.0, 4.0, 8.0, 16.0, 32.0)
_FINAL_NORMS = (64.0, 128.0, 256.0, 512.0, 1024.0)
# Ladders up to this many squares take part in `design` from random starts too: for narrow intervals
# the self-similar start is a bad one.
_MAX_RANDOM = 6
# How far the extrema of a Remez exchange may differ: they are computed to about this.
_ROUNDING = 1e-12


def max_error(ladder: Ladder, root: float, lower: float, num_nodes: int = 20_001) -> float:
    """The largest |x^(1/p) f(x) - 1| on [lower, 1].

    Args:
        ladder: f.
        root: p.
        lower: Lower end of the interval.
        num_nodes: Where it is looked at.

    Returns:
        The largest relative error of f as an approximation of x^(-1/p).
    """
    x = nodes(lower, num_nodes)
    return float((x ** (1.0 / root) * ladder(x) - 1.0).abs().max())


def remez(degree: int, root: float, lower: float) -> tuple[tuple[float, ...], float]:
    """The polynomial T of a degree that minimises the largest |x^(1/p) T(x) - 1| on [lower, 1].

    Remez exchange: solve x_i^(1/p) T(x_i) - 1 = ±E, signs alternating, for T and E on degree + 2
    points; move the points to the extrema of the error; repeat until no extremum exceeds E.

    Args:
        degree: At most about 8, for the monomial basis.
        root: p.
        lower: Lower end of the interval, in (0, 1).

    Returns:
        Coefficients a_0 … a_degree, and E.

    Raises:
        ArithmeticError: If the exchange does not converge.

    References:
        Trefethen, Approximation Theory and Approximation Practice, chapter 10.

    Examples:
        >>> coefficients, error = remez(1, 1.0, 0.5)  # the reciprocal on [1/2, 1]
        >>> [round(a, 4) for a in coefficients], round(error, 4)
        ([2.8235, -1.8824], 0.0588)
    """
    x = nodes(lower, 60_000)
    powers = x[:, None] ** torch.arange(degree + 1) * (x ** (1.0 / root))[:, None]
    signs = (-1.0) ** torch.arange(degree + 2, dtype=torch.float64)
    angle = torch.linspace(0.0, math.pi, degree + 2, dtype=torch.float64)
    start = lower + (1.0 - lower) * (1.0 - torch.cos(angle)) / 2.0
    points = torch.searchsorted(x, start).clamp_max(len(x) - 1)
    for _ in range(100):
        system = torch.cat((powers[points], signs[:, None]), dim=1)
        solution = torch.linalg.solve(system, torch.ones(degree + 2, dtype=torch.float64))
        error = powers @ solution[:-1] - 1.0
        worst = float(error.abs().max())
        if worst <= abs(float(solution[-1])) * (1.0 + 1e-9) + _ROUNDING:
            break
        points = _alternating_extrema(error, degree + 2)
    else:
        raise ArithmeticError(f"Remez exchange did not converge for {degree=}, {root=}, {lower=}.")
    return tuple(solution[:-1].tolist()), worst


def _alternating_extrema(error: Tensor, count: int) -> Tensor:
    """Positions of `count` extrema of alternating sign, the largest ones."""
    changes = torch.nonzero(torch.diff(error.sign())).flatten() + 1
    runs = torch.tensor_split(torch.arange(len(error)), changes.tolist())
    extrema = [int(run[error[run].abs().argmax()]) for run in runs]
    while len(extrema) > count:
        sizes = error[extrema].abs()
        if len(extrema) == count + 1:
            del extrema[0 if sizes[0] < sizes[-1] else -1]
        else:
            weakest = int(torch.minimum(sizes[:-1], sizes[1:]).argmin())
            del extrema[weakest : weakest + 2]
    if len(extrema) < count:
        raise ArithmeticError("The error of a Remez exchange has too few extrema.")
    return torch.tensor(extrema)


def quartic_ladder(coefficients: Sequence[float]) -> Ladder:
    """A polynomial of degree 0, 1, 2 or 4 as a ladder: a quartic by two squares.

        β = a_3/(2a_4);  W = M² + βM;  T = a_4 W² + (a_2 - a_4 β²) M² + a_1 M + a_0

    Args:
        coefficients: a_0 … a_degree.

    Returns:
        The ladder of the same values.

    Raises:
        ValueError: For another degree, or a_4 = 0.
    """
    a = list(coefficients)
    if len(a) in (1, 2, 3):
        return Ladder((), tuple(a) if len(a) > 1 else (a[0], 0.0))
    if len(a) != 5 or a[4] == 0.0:
        raise ValueError(f"No ladder for the coefficients {tuple(coefficients)}.")
    beta = a[3] / (2.0 * a[4])
    square = a[2] - a[4] * beta**2
    # M² is the rung W less βM.
    return Ladder(((1.0, beta, 0.0),), (a[0], a[1] - square * beta, square, a[4]))


def fit(start: Ladder, root: float, lower: float, num_nodes: int = 1500) -> tuple[Ladder, float]:
    """The minimax ladder next to a given one.

    Args:
        start: Where to start; k >= 2.
        root: p, any positive number.
        lower: Lower end of the interval, in (0, 1).
        num_nodes: Where the error is looked at.

    Returns:
        The ladder in its normal form, and its largest error. It is a local optimum: other starts
        may lead to a better one.
    """
    x = nodes(lower, num_nodes)
    theta = _to_vector(start)[None]
    for norm in (8.0, 32.0, *_FINAL_NORMS):
        theta = _descend(theta, x, root, norm, 60)
    ladder = _to_ladder(theta[0]).normalized(lower)
    return ladder, max_error(ladder, root, lower)


def design(
    num_matmuls: int, root: float, lower: float, starts: Sequence[Ladder] = ()
) -> tuple[Ladder, float]:
    """A good minimax ladder within a second or two, always the same.

    Args:
        num_matmuls: k >= 2.
        root: p.
        lower: Lower end of the interval.
        starts: Further starts: ladders of k squares for other roots or intervals.

    Returns:
        The ladder in its normal form, and its largest error: on average 10 % above that of `search`.
    """
    x = nodes(lower, 400)
    rungs = [ladder.rungs for ladder in starts]
    for fold, slope in ((1.1, 0.3), (1.3, 0.0), (1.3, 0.8), (1.5, 0.3), (1.5, -0.4), (1.8, 0.0)):
        rung = (fold, slope, 1.0 - fold)
        rungs.append(((5.0, -6.0, 1.0), *(rung for _ in range(num_matmuls - 2))))
    theta = torch.stack([_to_vector(_with_best_output(given, x, root)) for given in rungs])
    if num_matmuls <= _MAX_RANDOM:
        generator = torch.Generator().manual_seed(0)
        nothing = theta.new_empty(0, theta.shape[1])
        theta = torch.cat((theta, _candidates(num_matmuls, 30, nothing, (), generator)))
    for norm in _SEARCH_NORMS:
        theta = _descend(theta, x, root, norm, 50)
    sizes = _norm(_error(theta, x, root), math.inf)
    order = torch.where(sizes.isfinite(), sizes, math.inf).argsort()
    fits = [fit(_to_ladder(theta[i]), root, lower) for i in _distinct(order, sizes, 2)]
    return min(fits, key=lambda pair: pair[1])


def _with_best_output(
    rungs: tuple[tuple[float, float, float], ...], x: Tensor, root: float
) -> Ladder:
    """The ladder of given rungs whose output coefficients are the best in least squares."""
    ladder = Ladder(rungs, (0.0,) * (len(rungs) + 3))
    values, _ = _rungs(_to_vector(ladder)[None], x)
    basis = torch.cat((torch.ones_like(values[0]), *values, values[-1].square())).mT
    weight = x[:, None] ** (1.0 / root)
    output = torch.linalg.lstsq(basis * weight, torch.ones_like(weight)).solution
    return Ladder(rungs, tuple(output[:, 0].tolist()))


def search(
    num_matmuls: int,
    root: float,
    lower: float,
    *,
    num_rounds: int = 10,
    num_candidates: int = 16,
    seed: int = 0,
    starts: Sequence[Ladder] = (),
) -> tuple[Ladder, float]:
    """The best minimax ladder that many starts lead to.

    Each round improves random ladders, perturbations of the best ones so far, and `starts` (a
    ladder with fewer squares gets further rungs, random ones).

    Args:
        num_matmuls: k >= 2.
        root: p.
        lower: Lower end of the interval.
        num_rounds: Rounds.
        num_candidates: R, the ladders of a round.
        seed: Of the random numbers; the same seed finds the same ladder.
        starts: Good ladders to start from, such as those for fewer squares or a near interval.

    Returns:
        The ladder in its normal form, and its largest error.
    """
    generator = torch.Generator().manual_seed(seed)
    x = nodes(lower, 800)
    best = torch.empty(0, 4 * num_matmuls - 1, dtype=torch.float64)
    for _ in range(num_rounds):
        theta = _candidates(num_matmuls, num_candidates, best, starts, generator)
        for norm in _SEARCH_NORMS:
            theta = _descend(theta, x, root, norm, 50)
        theta = torch.cat((best, theta))
        sizes = _norm(_error(theta, x, root), math.inf)
        order = torch.where(sizes.isfinite(), sizes, math.inf).argsort()
        best = theta[_distinct(order, sizes)]
    fits = [fit(_to_ladder(theta), root, lower) for theta in best[:4]]
    return min(fits, key=lambda pair: pair[1])


def _distinct(order: Tensor, sizes: Tensor, count: int = 10) -> list[int]:
    """The first few of `order` whose error differs from the one before by more than 0.1 %."""
    chosen: list[int] = []
    for i in order.tolist():
        if not chosen or float(sizes[i]) > 1.001 * float(sizes[chosen[-1]]):
            chosen.append(i)
    return chosen[:count]


def _candidates(
    k: int, count: int, best: Tensor, starts: Sequence[Ladder], generator: torch.Generator
) -> Tensor:
    """(R, n) ladders to improve: perturbations of good ones, and random ones."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def pick(values: Sequence[float]) -> float:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    rows = []
    for i in range(count):
        if i % 4 == 0 or (len(best) == 0 and not starts):
            rows.append(normal(4 * k - 1) * pick((0.3, 1.0, 2.0)))
        elif starts and (i % 4 == 1 or len(best) == 0):
            ladder = starts[int(torch.randint(len(starts), (1,), generator=generator))]
            while ladder.num_matmuls < k:
                position = int(torch.randint(len(ladder.rungs), (1,), generator=generator))
                ladder = _lengthened(ladder, position, pick((1.0, 1.2, 1.4, 1.8)))
            theta = _to_vector(ladder)
            rows.append(theta * (1.0 + pick((0.0, 0.01, 0.05)) * normal(len(theta))))
        else:
            row = min(
                int(-1.5 * math.log(float(torch.rand(1, generator=generator)))), len(best) - 1
            )
            theta, size = best[row], pick((0.02, 0.05, 0.1, 0.3))
            if i % 2 == 0:
                rows.append(theta * (1.0 + size * normal(len(theta))))
            else:
                is_moved = torch.rand(len(theta), generator=generator) < 0.2
                rows.append(theta + size * theta.abs().mean() * normal(len(theta)) * is_moved)
    return torch.stack(rows)


def _lengthened(ladder: Ladder, position: int, factor: float) -> Ladder:
    """One rung more, by repeating one of them.

    Good ladders are self-similar: each rung is a bump at 0 about three times narrower than the one
    before, and x^(-1/p) is their sum over all scales. So a copy of a rung resolves an interval
    whose lower end is about three times lower; the weights beyond it rise by 3^(1/p).
    """
    rungs, output = ladder.rungs, ladder.output
    cut = position + 3  # the weight of the repeated rung is output[cut - 1]
    weights = (*output[:cut], *(factor * weight for weight in output[cut - 1 :]))
    return Ladder((*rungs[: position + 1], *rungs[position:]), weights)


def _to_vector(ladder: Ladder) -> Tensor:
    """(n,) parameters: all a_j, all b_j, all c_j, all γ_j; n = 4k - 1."""
    rungs = torch.tensor(ladder.rungs, dtype=torch.float64).reshape(-1, 3).mT.flatten()
    return torch.cat((rungs, torch.tensor(ladder.output, dtype=torch.float64)))


def _to_ladder(theta: Tensor) -> Ladder:
    """The ladder of (n,) parameters."""
    k = (len(theta) + 1) // 4
    rungs = theta[: 3 * (k - 1)].reshape(3, k - 1).mT.tolist()
    return Ladder(tuple((a, b, c) for a, b, c in rungs), tuple(theta[3 * (k - 1) :].tolist()))


def _rungs(theta: Tensor, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """S_1 … S_k at the nodes, (R, P) each, and the output coefficients (R, k + 2)."""
    k = (theta.shape[1] + 1) // 4
    a, b, c = theta[:, : 3 * (k - 1)].reshape(-1, 3, k - 1, 1).unbind(1)
    rungs = [x.expand(len(theta), -1)]
    for j in range(k - 1):
        rungs.append(a[:, j] * rungs[-1].square() + b[:, j] * x + c[:, j])
    return rungs, theta[:, 3 * (k - 1) :]


def _error(theta: Tensor, x: Tensor, root: float) -> Tensor:
    """(R, P) relative errors x^(1/p) f(x) - 1."""
    rungs, output = _rungs(theta, x)
    basis = torch.stack((torch.ones_like(rungs[0]), *rungs, rungs[-1].square()), dim=1)
    return torch.einsum("rk,rkp->rp", output, basis) * x ** (1.0 / root) - 1.0


def _jacobian(theta: Tensor, x: Tensor, root: float) -> Tensor:
    """(R, n, P) derivatives of the relative errors by the parameters, by adjoints of the rungs."""
    rungs, output = _rungs(theta, x)
    k = len(rungs)
    a = theta[:, : k - 1, None]
    adjoint = output[:, k, None] + 2.0 * output[:, k + 1, None] * rungs[-1]
    by_a, by_b, by_c = [], [], []
    for j in range(k - 1, 0, -1):
        by_a.append(adjoint * rungs[j - 1].square())
        by_b.append(adjoint * x)
        by_c.append(adjoint)
        adjoint = output[:, j, None] + 2.0 * a[:, j - 1] * rungs[j - 1] * adjoint
    last = (torch.ones_like(rungs[0]), *rungs, rungs[-1].square())
    rows = torch.stack((*reversed(by_a), *reversed(by_b), *reversed(by_c), *last), dim=1)
    return rows * x ** (1.0 / root)


def _norm(error: Tensor, norm: float) -> Tensor:
    """(R,) ‖e‖_q, the mean over the nodes, without overflow."""
    largest = error.abs().amax(dim=1)
    if norm == math.inf:
        return largest
    return largest * (error.abs() / largest[:, None]).pow(norm).mean(dim=1).pow(1.0 / norm)


def _descend(theta: Tensor, x: Tensor, root: float, norm: float, num_steps: int) -> Tensor:
    """Levenberg-Marquardt steps towards the least ‖e‖_q, for R ladders at once.

    The Gauss-Newton model of Σ|e|^q has the Hessian J W Jᵀ and the gradient J W e/(q - 1) with
    W = |e|^(q-2). A step that does not lower the norm is dropped and the damping raised.

    Args:
        theta: (R, n) parameters.
        x: (P,) nodes.
        root: p.
        norm: q.
        num_steps: Trial steps.

    Returns:
        (R, n) improved parameters.

    References:
        Nocedal and Wright, Numerical Optimization, section 10.3.
    """
    damping = torch.full((len(theta), 1), 1e-3, dtype=torch.float64)
    error = _error(theta, x, root)
    size = _norm(error, norm)
    size_before = math.inf * size
    for step_number in range(num_steps):
        if step_number % 10 == 0:
            if bool((size > 0.9999 * size_before).all()):
                break
            size_before = size
        weight = (error.abs() / error.abs().amax(dim=1, keepdim=True)).pow(norm - 2.0)
        jacobian = _jacobian(theta, x, root)
        weighted = jacobian * weight[:, None]
        hessian = weighted @ jacobian.mT
        gradient = (weighted @ error[:, :, None])[:, :, 0] / (norm - 1.0)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal += (damping * diagonal).clamp_min(1e-280) + 1e-14 * diagonal.amax(1, keepdim=True)
        step, _ = torch.linalg.solve_ex(hessian.nan_to_num(), gradient.nan_to_num())
        trial = theta - step
        trial_error = _error(trial, x, root)
        trial_size = _norm(trial_error, norm)
        is_better = ((trial_size < size) | (size.isnan() & trial_size.isfinite()))[:, None]
        theta = torch.where(is_better, trial, theta)
        error = torch.where(is_better, trial_error, error)
        size = torch.where(is_better[:, 0], trial_size, size)
        damping = torch.where(is_better, damping / 4.0, damping * 5.0).clamp(1e-12, 1e12)
    return theta


def main(arguments: Sequence[str] | None = None) -> str:
    """Search a ladder and write it as a row of `minimax_tables`.

    Args:
        arguments: Command line; None takes the process's own.

    Returns:
        The row.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=float, required=True)
    parser.add_argument("--relative-epsilon", type=float, required=True)
    parser.add_argument("--num-matmuls", type=int, required=True)
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    epsilon = chosen.relative_epsilon
    lower = epsilon / ((1.0 + epsilon) * (1.0 + chosen.margin))
    ladder, error = search(
        chosen.num_matmuls, chosen.root, lower, num_rounds=chosen.rounds, seed=chosen.seed
    )
    return f"({chosen.root}, {epsilon}, {error:.4g}, {ladder.rungs}, {ladder.output})"
