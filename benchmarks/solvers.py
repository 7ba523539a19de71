"""Accuracy, matmuls and time of every inverse-root solver, on real factor matrices and synthetic spectra.

    python benchmarks/solvers.py --output benchmarks/results/solvers_<hardware>_<date>

writes `<output>.md` (one table) and `<output>.png` (error against matmuls and against time). Every factor
matrix is scaled to λ_max = 1 first, so that an absolute epsilon and a relative one mean the same; errors
are against a float64 eigendecomposition with the very damping that the solver aims at.
`benchmarks/data/factors.pt` comes from `capture_factors.py`.

F: relative Frobenius error of a root, median and largest over the factors. dir: relative error of the
direction L^(-1/p) G R^(-1/p), median and largest over the weights.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dash_shampoo as ds
from dash_shampoo.inverse_root import InverseRootResult, inverse_root
from dash_shampoo.products import count_products

DATA = Path(__file__).parent / "data" / "factors.pt"
TIMED = {"64 of 256": (64, 256), "256 of 64": (256, 64)}
SETTINGS = ((4, 1e-3), (4, 1e-4), (4, 1e-6), (2, 1e-3), (2, 1e-4))


@dataclass(frozen=True)
class Row:
    """A solver with its settings: what stands in the table, and how to make its config for a damping."""

    name: str
    config: ds.RootInvConfig
    is_relative: bool = False


def rows(relative_epsilon: float) -> list[Row]:
    """All solvers, scalings and precisions for one relative damping."""

    def minimax(accuracy: float, precision: Any = "fp32") -> ds.MinimaxConfig:
        return ds.MinimaxConfig(
            accuracy=accuracy, relative_epsilon=relative_epsilon, matmul_precision=precision
        )

    power = ds.PowerIterationScaling(num_iterations=10)
    multi = ds.PowerIterationScaling(num_iterations=10, num_vectors=16)
    found = [
        Row("eigen", ds.EigenConfig()),
        Row("coupled Newton to 1e-6", ds.CoupledNewtonConfig()),
        Row("coupled Newton, 10 steps", ds.ScaledCoupledNewtonConfig(max_iterations=10)),
        Row("Newton-DB 10, Frobenius", ds.NewtonDBConfig()),
        Row("Newton-DB 10, power iteration", ds.NewtonDBConfig(scaling=power)),
        Row("Newton-DB 10, 16 vectors", ds.NewtonDBConfig(scaling=multi)),
        Row("Newton-DB 10, trace bound", ds.NewtonDBConfig(scaling=ds.TraceScaling())),
        Row("Newton-Schulz 10", ds.NewtonSchulzRootInvConfig(relative_epsilon=0.0)),
    ]
    for degree in (60, 100):
        config = ds.ChebyshevConfig(degree=degree, relative_epsilon=relative_epsilon)
        found.append(Row(f"Chebyshev {degree}", config, is_relative=True))
    for accuracy in (0.3, 1.5e-2, 1e-3):
        found.append(Row(f"minimax {accuracy:g}", minimax(accuracy), is_relative=True))
    for precision in ("fp16x3", "tf32", "bf16"):
        found.append(
            Row(f"minimax 0.015, {precision}", minimax(1.5e-2, precision), is_relative=True)
        )
    return found


@dataclass(frozen=True)
class Problem:
    """Pairs of factor matrices with a gradient between them, each scaled to λ_max = 1."""

    lefts: list[Tensor]
    rights: list[Tensor]
    gradients: list[Tensor]


def normalised(A: Tensor) -> Tensor:
    return A / torch.linalg.eigvalsh(A.double())[-1].float()


def real_problem(device: torch.device) -> Problem:
    lefts, rights, gradients = [], [], []
    for entry in torch.load(DATA):
        for left, right in entry["factors"].values():
            lefts.append(normalised(left).to(device))
            rights.append(normalised(right).to(device))
            gradients.append(entry["G"].to(device))
    return Problem(lefts, rights, gradients)


def synthetic_problem(device: torch.device, size: int = 128, count: int = 6) -> Problem:
    """Spectra that fall from 1 to 1e-2 … 1e-9, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(0)

    def matrix(exponent: int) -> Tensor:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return (basis * torch.logspace(0, -exponent, size, dtype=torch.float64) @ basis.T).float()

    exponents = torch.linspace(2, 9, count).round().int().tolist()
    return Problem(
        [matrix(e).to(device) for e in exponents],
        [matrix(e).to(device) for e in exponents],
        [torch.randn(size, size, generator=generator).to(device) for _ in exponents],
    )


def exact(A: Tensor, root: int, damping: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A.double())
    return (vectors * (values.clamp_min(0.0) + damping).pow(-1.0 / root)) @ vectors.T


def solve(A: Tensor, row: Row, root: int, relative_epsilon: float) -> InverseRootResult:
    epsilon = 0.0 if row.is_relative else relative_epsilon
    return inverse_root(A, root, row.config, epsilon)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Accuracy:
    """Errors of one solver on one problem."""

    frobenius: list[float]
    direction: list[float]
    num_matmuls: float
    num_symmetric: float


def measure_accuracy(problem: Problem, row: Row, root: int, relative_epsilon: float) -> Accuracy:
    frobenius, direction = [], []
    for left, right, gradient in zip(problem.lefts, problem.rights, problem.gradients, strict=True):
        roots, exacts = [], []
        for A in (left, right):
            result = solve(A, row, root, relative_epsilon)
            roots.append(result.value)
            exacts.append(exact(A, root, float(result.damping)))
            frobenius.append(relative_error(roots[-1], exacts[-1]))
        expected = exacts[0] @ gradient.double() @ exacts[1]
        direction.append(relative_error(roots[0] @ gradient @ roots[1], expected))
    A = problem.lefts[0]
    with count_products(num_blocks=1, size=A.shape[-1]) as count:
        solve(A, row, root, relative_epsilon)
    num_products = count.num_products + count.num_columns / A.shape[-1]
    return Accuracy(frobenius, direction, num_products, count.num_symmetric)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_times(
    all_rows: Sequence[Row], root: int, relative_epsilon: float, rounds: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each solver in each round, all solvers in turn within a round."""
    times: dict[str, dict[str, list[float]]] = {}
    for case, (count, size) in TIMED.items():
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(count, size, size // 2, generator=generator).to(device)
        stack = factor @ factor.mT
        stack /= torch.linalg.matrix_norm(stack, ord=2)[:, None, None]
        times[case] = {row.name: [] for row in all_rows}
        for number in range(rounds + 1):
            for row in all_rows:
                synchronise(device)
                started = time.perf_counter()
                solve(stack, row, root, relative_epsilon)
                synchronise(device)
                if number > 0:  # the first round warms up
                    times[case][row.name].append(1e3 * (time.perf_counter() - started))
    return times


def pair(values: list[float]) -> str:
    return f"{statistics.median(values):.1e} / {max(values):.1e}"


def ratio(times: dict[str, list[float]], name: str, reference: str) -> str:
    ratios = [r / t for r, t in zip(times[reference], times[name], strict=True)]
    return f"{statistics.median(ratios):.2f}"


def report(args: argparse.Namespace, device: torch.device) -> tuple[str, list[dict[str, Any]]]:
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    )
    lines = [
        "# Inverse-root solvers",
        "",
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, dash_shampoo "
        f"{ds.__version__}; `python benchmarks/solvers.py --rounds {args.rounds}`.",
        "",
        "F: relative Frobenius error of the root, dir: relative error of the direction L^(-1/p) G R^(-1/p); "
        "median / largest. Matmuls: those of a matrix by itself in brackets. Faster: the median over "
        f"{args.rounds} interleaved rounds of the time of Newton-DB 10 with Frobenius scaling, and of eigen, "
        "divided by the solver's.",
    ]
    points = []
    problems = {"real": real_problem(device), "synthetic": synthetic_problem(device)}
    for root, relative_epsilon in SETTINGS:
        all_rows = rows(relative_epsilon)
        times = measure_times(all_rows, root, relative_epsilon, args.rounds, device)
        heads = "".join(f" faster than Newton-DB / eigen, {case} |" for case in TIMED)
        lines += ["", f"## p = {root}, relative damping {relative_epsilon:g}", ""]
        lines.append(f"| solver | matmuls | F, real | dir, real | dir, synthetic |{heads}")
        lines.append("|---|---|---|---|---|" + "---|" * len(TIMED))
        for row in all_rows:
            found = {
                name: measure_accuracy(problem, row, root, relative_epsilon)
                for name, problem in problems.items()
            }
            real = found["real"]
            count = f"{real.num_matmuls:.4g} ({real.num_symmetric:.4g})"
            cells = [row.name, count, pair(real.frobenius), pair(real.direction)]
            cells.append(pair(found["synthetic"].direction))
            for case in TIMED:
                by_solver = times[case]
                reference = "Newton-DB 10, Frobenius"
                cells.append(
                    f"{ratio(by_solver, row.name, reference)} / {ratio(by_solver, row.name, 'eigen')}"
                )
            lines.append("| " + " | ".join(cells) + " |")
            points.append(
                {
                    "setting": (root, relative_epsilon),
                    "name": row.name,
                    "matmuls": real.num_matmuls,
                    "direction": statistics.median(real.direction),
                    "time": statistics.median(times["64 of 256"][row.name]),
                    "reference": statistics.median(times["64 of 256"]["Newton-DB 10, Frobenius"]),
                }
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n", points


FAMILIES = {
    "minimax": ("tab:red", "o"),
    "Newton-DB": ("tab:blue", "s"),
    "coupled": ("tab:green", "^"),
    "Chebyshev": ("tab:orange", "D"),
    "eigen": ("black", "*"),
}


def plot(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [
        p for p in points if "," not in p["name"] or p["name"].startswith(("Newton", "coupled"))
    ]
    settings = [s for s in SETTINGS if s in {(4, 1e-4), (2, 1e-4)}]
    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 4 * len(settings)), squeeze=False)
    for line, setting in zip(axes, settings, strict=True):
        for axis, key in zip(line, ("matmuls", "time"), strict=True):
            for family, (colour, marker) in FAMILIES.items():
                members = [
                    p for p in shown if p["setting"] == setting and p["name"].startswith(family)
                ]
                if key == "matmuls":
                    members = [p for p in members if family != "eigen"]
                x = [p[key] / (p["reference"] if key == "time" else 1.0) for p in members]
                y = [p["direction"] for p in members]
                axis.scatter(x, y, c=colour, marker=marker, s=60, label=family, alpha=0.85)
            axis.set_yscale("log")
            axis.set_xscale("log")
            axis.grid(alpha=0.3, which="both")
            axis.set_ylabel("median error of the direction")
            axis.set_title(f"p = {setting[0]}, relative damping {setting[1]:g}")
        line[0].set_xlabel("batched matmuls")
        line[1].set_xlabel("time relative to Newton-DB (64 factors of 256)")
    axes[0][1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="path without ending; default: print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text, points = report(args, torch.device(args.device))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output + ".md").write_text(text)
        plot(points, Path(args.output + ".png"))


if __name__ == "__main__":
    main()
