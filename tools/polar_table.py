"""Finds the quintics of `dash_shampoo/orthogonalization/polar_table.py` and writes that file.

    python tools/polar_table.py

For every lower end l of the singular values, the odd polynomial p(x) = ax + bx³ + cx⁵ with the smallest
max |1 - p(x)| on [l, u], u = 1, then on the interval [1 - E, 1 + E] that this one leaves, and so on. The
best polynomial has the errors E, -E, E, -E at l, q, r, u, with q and r the extremes between (Chebyshev);
it is found by Remez' exchange in exact enough arithmetic (50 digits). The upper end is taken 1 % higher
than it need be, for iterations that are rounded to bf16.
"""

from __future__ import annotations

from decimal import Decimal, getcontext
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "dash_shampoo/orthogonalization/polar_table.py"
LOWER_ENDS = ("0.1", "0.01", "0.001", "0.0001")
NUM_STEPS = 8
MARGIN = Decimal("1.01")
# An interval that is this small is served by the polynomial of highest contact with 1 at its middle.
SMALLEST = Decimal("1e-7")

getcontext().prec = 50


def solve(rows: list[list[Decimal]]) -> list[Decimal]:
    """The solution of linear equations, given with their right sides; Gauss with pivoting."""
    size = len(rows)
    rows = [row[:] for row in rows]
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(size):
            if i != k:
                factor = rows[i][k] / rows[k][k]
                rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    return [rows[k][size] / rows[k][k] for k in range(size)]


def best_quintic(lower: Decimal, upper: Decimal) -> tuple[tuple[Decimal, ...], Decimal]:
    """(a, b, c) of the odd quintic nearest to 1 on [lower, upper], and its largest error."""
    if upper - lower < SMALLEST * upper:
        middle = (lower + upper) / 2
        contact = (Decimal(15) / 8, Decimal(-10) / 8, Decimal(3) / 8)
        return tuple(x / middle**k for x, k in zip(contact, (1, 3, 5), strict=True)), Decimal(0)
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    for _ in range(200):
        points = (lower, q, r, upper)
        a, b, c, error = solve(
            [[x, x**3, x**5, Decimal((-1) ** i), Decimal(1)] for i, x in enumerate(points)]
        )
        # p'(x) = a + 3bx² + 5cx⁴
        root = (9 * b * b - 20 * a * c).sqrt()
        new_q, new_r = ((-3 * b - root) / (10 * c)).sqrt(), ((-3 * b + root) / (10 * c)).sqrt()
        moved = abs(new_q - q) + abs(new_r - r)
        q, r = new_q, new_r
        if moved < Decimal("1e-40"):
            break
    return (a, b, c), abs(error)


def chain(lower_end: str) -> list[tuple[tuple[float, float, float], float]]:
    """Every step's (a, b, c), and the largest |1 - p| after it."""
    lower, upper = Decimal(lower_end), Decimal(1)
    steps = []
    for _ in range(NUM_STEPS):
        (a, b, c), error = best_quintic(lower, upper * MARGIN)
        steps.append(((float(a), float(b), float(c)), float(error)))
        lower, upper = 1 - error, 1 + error
    return steps


def render() -> str:
    """The table as a Python file."""
    lines = [
        '"""Quintics (a, b, c) of every step by the smallest singular value; by tools/polar_table.py."""',
        "",
        "QUINTICS: dict[float, tuple[tuple[float, float, float], ...]] = {",
    ]
    for lower_end in LOWER_ENDS:
        lines.append(f"    {float(lower_end)!r}: (")
        lines += [f"        ({a:.12g}, {b:.12g}, {c:.12g})," for (a, b, c), _ in chain(lower_end)]
        lines.append("    ),")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    TABLE.write_text(render())
