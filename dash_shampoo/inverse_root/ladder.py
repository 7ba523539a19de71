"""Squaring ladders: polynomials of degree 2^k that cost k products, every one of them a square.

Shape suffixes: M_BNN is a stack of B blocks of N×N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ladder:
    """f(x) = γ_0 + γ_1 x + Σ_{j=2..k} γ_j S_j + γ_(k+1) S_k²,  S_1 = x,  S_j = a_j S_(j-1)² + b_j x + c_j.

    The rungs S_2 … S_k and the last square cost k products of a matrix by itself, so each of them is
    symmetric by structure. Each rung is one fused multiply-add of the product. No other scheme that
    was tried comes closer to x^(-1/p) for the same number of products and of elementwise passes:
    a ladder has about 3k free parameters but oscillates up to 2^k times, since the quadratic map
    S ↦ aS² + … folds the interval like Chebyshev's T_2 does.

    Attributes:
        rungs (tuple): (a_j, b_j, c_j) for j = 2 … k; empty for k <= 1.
        output (tuple): γ_0, γ_1, …, γ_(k+1); two numbers for k = 0.

    Examples:
        >>> Ladder(rungs=(), output=(1.0, 0.0, 2.0))(torch.tensor([3.0])).tolist()
        [19.0]
        >>> Ladder(rungs=((1.0, 0.0, 1.0),), output=(0.0, 0.0, 0.0, 1.0)).degree
        4
    """

    rungs: tuple[tuple[float, float, float], ...]
    output: tuple[float, ...]

    def __post_init__(self) -> None:
        expected = len(self.rungs) + 3 if self.rungs else (2, 3)
        if len(self.output) not in (expected if isinstance(expected, tuple) else (expected,)):
            raise ValueError(
                f"{len(self.rungs)} rungs need {expected} output coefficients, not "
                f"{len(self.output)}."
            )

    @property
    def num_matmuls(self) -> int:
        """k, the number of squares."""
        return len(self.output) - 2

    @property
    def degree(self) -> int:
        """2^k: of f as a polynomial."""
        return int(2**self.num_matmuls)

    def __call__(self, x: Tensor) -> Tensor:
        """F at numbers.

        Args:
            x: Tensor of any shape.

        Returns:
            f(x), of the same shape and dtype.
        """
        result = self.output[0] + self.output[1] * x
        if self.num_matmuls == 0:
            return result
        rung = x
        for (a, b, c), weight in zip(self.rungs, self.output[2:], strict=False):
            rung = a * rung.square() + b * x + c
            result = result + weight * rung
        return result + self.output[-1] * rung.square()

    def scaled(self, factor: float) -> Ladder:
        """Factor · f."""
        return Ladder(self.rungs, tuple(factor * weight for weight in self.output))

    def normalized(self, lower: float, num_nodes: int = 4001) -> Ladder:
        """The same f with max|S_j| = 1 on [lower, 1] and a_j > 0, which makes the form unique.

        Rungs of size 1 also suit half precision: their entries are at most 1.

        Args:
            lower: Lower end of the interval.
            num_nodes: Number of nodes where the maximum is taken.

        Returns:
            A ladder of the same values.
        """
        x = nodes(lower, num_nodes)
        rungs, output = [], list(self.output)
        rung, scale = x, 1.0  # the new rung is the old one times `scale`
        for j, (a, b, c) in enumerate(self.rungs):
            # In terms of the new previous rung, the old one is a/scale²·S² + b·x + c.
            a = a / scale**2
            rung = a * rung.square() + b * x + c
            scale = float(1.0 / rung.abs().max()) * (1.0 if a > 0.0 else -1.0)
            rung = rung * scale
            rungs.append((a * scale, b * scale, c * scale))
            output[j + 2] /= scale
        if rungs:
            output[-1] /= scale**2
        return Ladder(tuple(rungs), tuple(output))


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
