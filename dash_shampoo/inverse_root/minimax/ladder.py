"""Squaring ladders: polynomials of degree 2^k that cost k products, every one of them a square."""

from __future__ import annotations

from dataclasses import dataclass

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
        rungs (tuple): (a_j, b_j, c_j) for j = 2 … k; at least one.
        output (tuple): γ_0, γ_1, …, γ_(k+1).

    Examples:
        >>> import torch
        >>> ladder = Ladder(rungs=((1.0, 0.0, 1.0),), output=(0.0, 0.0, 0.0, 1.0))
        >>> ladder(torch.tensor([3.0])).tolist(), ladder.num_squarings
        ([100.0], 2)
    """

    rungs: tuple[tuple[float, float, float], ...]
    output: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rungs or len(self.output) != len(self.rungs) + 3:
            raise ValueError(
                f"{len(self.rungs)} rungs need {len(self.rungs) + 3} output coefficients and at least one "
                f"rung, not {len(self.output)} coefficients."
            )

    @property
    def num_squarings(self) -> int:
        """k, the number of products."""
        return len(self.rungs) + 1

    def __call__(self, x: Tensor) -> Tensor:
        """F at numbers.

        Args:
            x: Tensor of any shape.

        Returns:
            f(x), of the same shape and dtype.
        """
        result = self.output[0] + self.output[1] * x
        rung = x
        for (a, b, c), weight in zip(self.rungs, self.output[2:], strict=False):
            rung = a * rung.square() + b * x + c
            result = result + weight * rung
        return result + self.output[-1] * rung.square()
