"""Minimax approximations of x^(-1/p) on [lower, 1], in float64: how the tables of minimax are found.

P: nodes on the interval, R: candidates that are improved side by side, n: parameters of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dash_shampoo.inverse_root.minimax.ladder import Ladder

# Exponents of the norms ‖e‖_q whose minima lead to the minimax: the largest is within 1 % of it.
SEARCH_NORMS = (2.0, 4.0, 8.0, 16.0, 32.0)
_FINAL_NORMS = (64.0, 128.0, 256.0, 512.0, 1024.0)


def nodes(lower: float, count: int) -> Tensor:
    """Nodes on [lower, 1], dense at both ends like Chebyshev's and, a third of them, logarithmic.

    Args:
        lower: Lower end, in (0, 1).
        count: About how many.

    Returns:
        Increasing float64 numbers, both ends among them.
    """
    angle = torch.linspace(0.0, torch.pi, count - count // 3, dtype=torch.float64)
    chebyshev = lower + (1.0 - lower) * (1.0 - torch.cos(angle)) / 2.0
    logarithmic = lower ** torch.linspace(1.0, 0.0, count // 3, dtype=torch.float64)
    return torch.cat((chebyshev, logarithmic)).clamp(lower, 1.0).sort().values


def normalized(ladder: Ladder, lower: float, num_nodes: int = 4001) -> Ladder:
    """The same f with max|S_j| = 1 on [lower, 1] and a_j > 0, which makes the form unique.

    Rungs of size 1 also suit half precision: their entries are at most 1.

    Args:
        ladder: f.
        lower: Lower end of the interval.
        num_nodes: Number of nodes where the maximum is taken.

    Returns:
        A ladder of the same values.
    """
    x = nodes(lower, num_nodes)
    rungs, output = [], list(ladder.output)
    rung, scale = x, 1.0  # the new rung is the old one times `scale`
    for j, (a, b, c) in enumerate(ladder.rungs):
        # In terms of the new previous rung, the old one is a/scale²·S² + b·x + c.
        a = a / scale**2
        rung = a * rung.square() + b * x + c
        scale = float(1.0 / rung.abs().max()) * (1.0 if a > 0.0 else -1.0)
        rung = rung * scale
        rungs.append((a * scale, b * scale, c * scale))
        output[j + 2] /= scale
    output[-1] /= scale**2
    return Ladder(tuple(rungs), tuple(output))


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
    theta = to_vector(start)[None]
    for norm in (8.0, 32.0, *_FINAL_NORMS):
        theta = descend(theta, x, root, norm, 60)
    ladder = normalized(to_ladder(theta[0]), lower)
    return ladder, max_error(ladder, root, lower)


def with_best_output(
    rungs: tuple[tuple[float, float, float], ...], x: Tensor, root: float
) -> Ladder:
    """The ladder of given rungs whose output coefficients are the best in least squares."""
    ladder = Ladder(rungs, (0.0,) * (len(rungs) + 3))
    values, _ = _rungs(to_vector(ladder)[None], x)
    basis = torch.cat((torch.ones_like(values[0]), *values, values[-1].square())).mT
    weight = x[:, None] ** (1.0 / root)
    output = torch.linalg.lstsq(basis * weight, torch.ones_like(weight)).solution
    return Ladder(rungs, tuple(output[:, 0].tolist()))


def distinct(order: Tensor, sizes: Tensor, count: int = 10) -> list[int]:
    """The first few of `order` whose error differs from the one before by more than 0.1 %."""
    chosen: list[int] = []
    for i in order.tolist():
        if not chosen or float(sizes[i]) > 1.001 * float(sizes[chosen[-1]]):
            chosen.append(i)
    return chosen[:count]


def candidates(
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
            while ladder.num_squarings < k:
                position = int(torch.randint(len(ladder.rungs), (1,), generator=generator))
                ladder = lengthened(ladder, position, pick((1.0, 1.2, 1.4, 1.8)))
            theta = to_vector(ladder)
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


def lengthened(ladder: Ladder, position: int, factor: float) -> Ladder:
    """One rung more, by repeating one of them.

    Good ladders are self-similar: each rung is a bump at 0 about three times narrower than the one
    before, and x^(-1/p) is their sum over all scales. So a copy of a rung resolves an interval
    whose lower end is about three times lower; the weights beyond it rise by 3^(1/p).
    """
    rungs, output = ladder.rungs, ladder.output
    cut = position + 3  # the weight of the repeated rung is output[cut - 1]
    weights = (*output[:cut], *(factor * weight for weight in output[cut - 1 :]))
    return Ladder((*rungs[: position + 1], *rungs[position:]), weights)


def to_vector(ladder: Ladder) -> Tensor:
    """(n,) parameters: all a_j, all b_j, all c_j, all γ_j; n = 4k - 1."""
    rungs = torch.tensor(ladder.rungs, dtype=torch.float64).reshape(-1, 3).mT.flatten()
    return torch.cat((rungs, torch.tensor(ladder.output, dtype=torch.float64)))


def to_ladder(theta: Tensor) -> Ladder:
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


def errors_of(theta: Tensor, x: Tensor, root: float) -> Tensor:
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


def norm_of(error: Tensor, norm: float) -> Tensor:
    """(R,) ‖e‖_q, the mean over the nodes, without overflow."""
    largest = error.abs().amax(dim=1)
    if norm == math.inf:
        return largest
    return largest * (error.abs() / largest[:, None]).pow(norm).mean(dim=1).pow(1.0 / norm)


def descend(theta: Tensor, x: Tensor, root: float, norm: float, num_steps: int) -> Tensor:
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
    error = errors_of(theta, x, root)
    size = norm_of(error, norm)
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
        trial_error = errors_of(trial, x, root)
        trial_size = norm_of(trial_error, norm)
        is_better = ((trial_size < size) | (size.isnan() & trial_size.isfinite()))[:, None]
        theta = torch.where(is_better, trial, theta)
        error = torch.where(is_better, trial_error, error)
        size = torch.where(is_better[:, 0], trial_size, size)
        damping = torch.where(is_better, damping / 4.0, damping * 5.0).clamp(1e-12, 1e12)
    return theta
