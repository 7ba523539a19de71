"""Time of an optimizer step: DashShampoo against the base's own sequential list.

All variants of a case take their steps in one interleaved run, in an order that is reversed every
round, so that whatever else the machine does falls on all of them alike. Given are medians, and ratios
taken round by round, with their quartiles. fp32, no distribution, gradients are given: forward and
backward are not timed.

    python benchmarks/step_time.py --threads 2 --output benchmarks/results/step_time_cpu_2026-01-31.md
"""

import argparse
import datetime
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import dash_shampoo as ds

Shapes = list[tuple[tuple[int, ...], int]]


def llama(layers: int, width: int, vocabulary: int) -> Shapes:
    """Weight shapes of a Llama, each with how often it occurs."""
    hidden = 256 * -(-8 * width // (3 * 256))
    return [
        ((vocabulary, width), 2),
        ((width, width), 4 * layers),
        ((hidden, width), 2 * layers),
        ((width, hidden), layers),
        ((width,), 2 * layers + 1),
    ]


@dataclass(frozen=True)
class Case:
    """Parameters to step, and the block size they are cut to."""

    description: str
    shapes: Shapes
    block: int


CASES = {
    "256x64": Case("256 factors of 64 (128 weights of 64×64)", [((64, 64), 128)], 64),
    "64x256": Case("64 factors of 256 (32 weights of 256×256)", [((256, 256), 32)], 256),
    "llama-tiny": Case("Llama, 2 layers, width 128, block 64", llama(2, 128, 512), 64),
    "llama-30m": Case("Llama, 6 layers, width 640, block 256", llama(6, 640, 32000), 256),
    "llama-953m": Case("Llama, 16 layers, width 2048, block 1024", llama(16, 2048, 32000), 1024),
}
DEFAULT_CASES = ("256x64", "64x256", "llama-tiny")


@dataclass(frozen=True)
class Solver:
    """A solver config; `on_base` where the base can compute it too."""

    make: Callable[[], ds.RootInvConfig]
    on_base: bool


SOLVERS = {
    "eigen": Solver(ds.EigenConfig, on_base=True),
    "coupled_newton": Solver(lambda: ds.CoupledNewtonConfig(max_iterations=10), on_base=True),
    "newton_db": Solver(ds.NewtonDBConfig, on_base=False),
    "chebyshev": Solver(ds.ChebyshevConfig, on_base=False),
    "minimax": Solver(ds.MinimaxConfig, on_base=False),
}


@dataclass
class Variant:
    """One optimizer of a case, and the times of its steps in milliseconds."""

    solver: str
    is_base: bool
    initial: Sequence[Tensor]
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    times: list[float] = field(default_factory=list)


def make_parameters(case: Case, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(device)
        for shape, count in case.shapes
        for _ in range(count)
    ]


def make_gradients(values: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gradients whose rows and columns decay over two decades, so that factors are ill-conditioned."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for value in values:
        gradient = torch.randn(value.shape, generator=generator)
        for dim, size in enumerate(value.shape):
            shape = [1] * value.ndim
            shape[dim] = size
            gradient *= torch.logspace(0, -2, size).reshape(shape)
        gradients.append(gradient.to(value.device))
    return gradients


def make_variant(
    solver: str, is_base: bool, values: Sequence[Tensor], case: Case, options: argparse.Namespace
) -> Variant:
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer_class = ds.DistributedShampoo if is_base else ds.DashShampoo
    optimizer = optimizer_class(
        parameters,
        lr=1e-3,
        betas=(0.9, 0.95),
        epsilon=1e-10,
        max_preconditioner_dim=case.block,
        precondition_frequency=options.precondition_frequency,
        start_preconditioning_step=options.precondition_frequency,
        grafting_config=ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
        preconditioner_config=ds.RootInvShampooPreconditionerConfig(
            amortized_computation_config=SOLVERS[solver].make(),
            use_symmetric_packing=options.use_symmetric_packing,
        ),
    )
    return Variant(solver, is_base, values, parameters, optimizer)


def milliseconds(function: Callable[[], object], device: str, repetitions: int) -> float:
    """Time of one call, mean over `repetitions`; on CUDA between two events, from an idle GPU."""
    if device == "cuda":
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        torch.cuda.synchronize()
        start.record()
        for _ in range(repetitions):
            function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / repetitions
    begin = time.perf_counter()
    for _ in range(repetitions):
        function()
    return (time.perf_counter() - begin) * 1e3 / repetitions


def run_case(case: Case, options: argparse.Namespace) -> list[Variant]:
    values = make_parameters(case, options.device)
    variants = [
        make_variant(solver, is_base, values, case, options)
        for solver in options.solvers
        for is_base in ((True, False) if SOLVERS[solver].on_base else (False,))
    ]
    # Every measurement spans the steps from one refresh of the roots to the next.
    repetitions = options.precondition_frequency
    for number in range(options.warmup + options.rounds):
        gradients = make_gradients(values, seed=number + 1)
        for variant in variants if number % 2 == 0 else variants[::-1]:
            for parameter, gradient in zip(variant.parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            elapsed = milliseconds(variant.optimizer.step, options.device, repetitions)
            if number >= options.warmup:
                variant.times.append(elapsed)
    return variants


def find(variants: Sequence[Variant], solver: str, is_base: bool) -> Variant | None:
    return next((v for v in variants if v.solver == solver and v.is_base == is_base), None)


def ratio(numerator: Variant | None, denominator: Variant | None) -> str:
    """Median of the rounds' ratios, and their quartiles."""
    if numerator is None or denominator is None:
        return "–"
    ratios = [a / b for a, b in zip(numerator.times, denominator.times, strict=True)]
    median = statistics.median(ratios)
    if len(ratios) < 4:
        return f"{median:.2f}"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


@torch.no_grad()
def difference(base: Variant | None, ours: Variant | None) -> str:
    """Largest relative distance of what a parameter has moved: both computed the same steps."""
    if base is None or ours is None:
        return "–"
    worst = max(
        float((a - b).norm() / (a - start).norm())
        for a, b, start in zip(base.parameters, ours.parameters, base.initial, strict=True)
    )
    return f"{worst:.0e}"


def rows_of(name: str, variants: Sequence[Variant]) -> list[str]:
    rows = []
    eigen = find(variants, "eigen", is_base=True)
    for solver in dict.fromkeys(variant.solver for variant in variants):
        base, ours = (find(variants, solver, is_base) for is_base in (True, False))
        cells = [
            name,
            solver,
            *(f"{statistics.median(v.times):.1f}" if v else "–" for v in (base, ours)),
            ratio(base, ours),
            ratio(eigen, ours),
            difference(base, ours),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


HEADER = (
    "| Case | Solver | Base, ms | DashShampoo, ms | Base / DashShampoo | Base with eigen / DashShampoo "
    "| Difference |\n|---|---|---|---|---|---|---|"
)


def processor(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def preface(options: argparse.Namespace) -> str:
    lines = [
        "# Optimizer step, DashShampoo against the base's sequential list",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Hardware: {processor(options.device)}; {options.threads} threads of {os.cpu_count()}",
        f"- Versions: dash_shampoo {ds.__version__}, base {ds.base.name}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"- Command: `python benchmarks/step_time.py {' '.join(options.words)}`".rstrip(" `") + "`",
        f"- Medians of {options.rounds} interleaved rounds after {options.warmup}; ratios are medians of "
        "the rounds' ratios, with quartiles. fp32, Adam grafting; roots every "
        f"{options.precondition_frequency} step(s), symmetric packing "
        f"{'on' if options.use_symmetric_packing else 'off'}.",
        "- Difference: of what a parameter has moved in all rounds, ours from the base's, relative, the "
        "largest of all parameters.",
        "",
        *(f"- `{name}`: {CASES[name].description}" for name in options.cases),
        *(f"- `{name}`: {SOLVERS[name].make()}" for name in options.solvers),
        "",
    ]
    return "\n".join(lines)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time of an optimizer step: DashShampoo against the base's sequential list.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=DEFAULT_CASES, help="sets of parameters"
    )
    parser.add_argument(
        "--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS), help="solvers"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--threads", type=positive, default=2, help="threads of the CPU")
    parser.add_argument("--rounds", type=positive, default=11, help="timed rounds of each case")
    parser.add_argument("--warmup", type=positive, default=2, help="rounds before them")
    parser.add_argument(
        "--precondition-frequency", type=positive, default=1, help="steps between two refreshes"
    )
    parser.add_argument(
        "--use-symmetric-packing", action="store_true", help="keep the base's packed state"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args(words)
    options.words = list(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return options


def main(words: Sequence[str]) -> str:
    options = parse(words)
    torch.set_num_threads(options.threads)
    # Both bases warn of every capped Newton iteration; writing that down would be timed too.
    logging.disable(logging.WARNING)
    report = [preface(options), HEADER]
    print("\n".join(report), flush=True)
    for name in options.cases:
        rows = rows_of(name, run_case(CASES[name], options))
        print("\n".join(rows), flush=True)
        report += rows
    text = "\n".join(report) + "\n"
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
