"""Everything that is to be known of one GPU, by one command of about eight minutes.

    python benchmarks/gpu.py                 # writes benchmarks/results/gpu_<device>_<date>.md
    python benchmarks/gpu.py --device cpu --toy --output /tmp/x.md

1. The fused square against torch's products: errors against float64, ragged sizes too, and times.
2. Every solver on one stack: time, and the share of the device's product rate that it reaches.
3. The step of one of eight ranks of Llama-953M, blocks of 1024 and 2048, and of GPT-2 124M on one GPU,
   refreshed every 1 and 10 steps, beside the sequential list of the base in use, Muon, AdamW, and DashGpu
   if importable.

Without a GPU it runs at toy sizes, so that it is known to run; its times then mean nothing. A part that would
begin after the time is spent is left out, an optimizer that takes no step with a model too, and the report
says so. At its top stand the bars of `gpu_bars.py`, and whether they are met.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from benchmarks import step_time
from benchmarks.cases import Case, Shapes, llama, make_parameters
from benchmarks.gpu_bars import bar_table
from benchmarks.peers import PEERS
from benchmarks.rank_share import blocks_of_rank
from dash_shampoo.inverse_root import inverse_root
from dash_shampoo.planning.devices import DEVICES, precision_of
from dash_shampoo.planning.solver_cost import measure_solver
from dash_shampoo.products import Products
from dash_shampoo.products.fused import FUSED_PRECISIONS

RESULTS = Path(__file__).parent / "results"
ROOT = 2
# The sequential list of the base has what the embedded one and Meta's both have.
STEP_CONFIGS = ("default", "minimax", "minimax_auto", "newton_db", "coupled_newton")
# About as many bytes in each stack.
ELEMENTS = 2**24
# Sums in another order, beside the error that the reference makes.
TOLERANCE = 2e-6


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        squares (tuple): N of the squares that are timed.
        ragged (tuple): N of those whose errors alone are looked at.
        stack (tuple): B and N of the solvers' stack.
        cases (dict): Cases of whole steps.
        rounds (int): Of whole steps.
    """

    squares: tuple[int, ...]
    ragged: tuple[int, ...]
    stack: tuple[int, int]
    cases: dict[str, Case]
    rounds: int


def gpt2() -> Shapes:
    """GPT-2 124M, its vocabulary padded to a multiple of 64."""
    layer = [((2304, 768), 12), ((768, 768), 12), ((3072, 768), 12), ((768, 3072), 12)]
    vectors = [((768,), 74), ((2304,), 12), ((3072,), 12)]
    return [((50304, 768), 1), ((1024, 768), 1), *layer, *vectors]


def share(shapes: Shapes, block: int, world_size: int, name: str) -> Case:
    """The blocks of the rank that has most to do, as parameters of their own."""
    whole = [shape for shape, count in shapes for _ in range(count)]
    blocks = blocks_of_rank(whole, block, world_size)
    text = f"{name}, block {block}: the share of one of {world_size} ranks, {len(blocks)} blocks"
    return Case(text, [(shape, 1) for _, shape in blocks], block)


def sizes(is_toy: bool) -> Sizes:
    """Those of the report, or such as a CPU does in seconds."""
    if is_toy:
        toy = share(llama(1, 16, 32, 24), 8, 2, "Llama of 1 layer and width 16")
        return Sizes((16, 32), (7, 33), (2, 16), {"toy": toy}, rounds=1)
    model = llama(16, 2048, 32000)
    cases = {f"llama-953m-{block}": share(model, block, 8, "Llama-953M") for block in (1024, 2048)}
    cases["gpt2-124m"] = Case("GPT-2 124M on one GPU, block 1024", gpt2(), 1024)
    return Sizes((64, 128, 256, 512, 1024, 2048), (100, 507, 1000), (16, 1024), cases, rounds=3)


class Clock:
    """Times calls on a device, and tells how much of the budget is left.

    Args:
        device: "cuda" or "cpu".
        seconds: The budget.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self._end = time.monotonic() + seconds

    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() >= self._end

    def milliseconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """The median time of a call, after one that is not timed."""
        kind = "cuda" if self.device == "cuda" else "wall clock"
        call()
        return statistics.median(step_time.milliseconds(call, 1, kind) for _ in range(repeats))


# ----------------------------------------------------------------------------------- squares


def stack_of(num_blocks: int, size: int, device: str) -> Tensor:
    """Symmetric blocks with eigenvalues between 0 and 3."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randn(num_blocks, size, size, generator=generator) / size**0.5
    S: Tensor = (noise + noise.mT) / 2 + 1.5 * torch.eye(size)
    return S.to(device)


def errors_of_square(precision: Any, size: int, device: str) -> tuple[float, float]:
    """The relative errors of the square that serves, and of torch's products, against float64."""
    S, M = stack_of(2, size, device), stack_of(2, size + 1, device)[:, :size, :size].contiguous()
    products, truth = Products(precision), 0.5 * S.double() @ S.double() - 0.25 * M.double()
    ours = products.square(S, alpha=0.5, addend=M, beta=-0.25)
    reference = products._reference_square(
        S, torch.empty_like(S), 0.5, M, -0.25, shift=0.0, scale=None
    )
    first, second = (float((x - truth).norm() / truth.norm()) for x in (ours, reference))
    return first, second


def squares(size_table: Sizes, clock: Clock) -> list[dict[str, Any]]:
    """Errors and times of every precision and size."""
    rows: list[dict[str, Any]] = []
    exact = Products("fp32")
    for size in (*size_table.squares, *size_table.ragged):
        S = stack_of(max(1, min(256, ELEMENTS // size**2)), size, clock.device)
        out, M = torch.empty_like(S), S.clone()
        is_timed = size in size_table.squares

        bmm_fp32 = partial(exact._reference_square, S, out, 0.5, M, 0.5, 0.0, None)
        fp32 = clock.milliseconds(bmm_fp32) if is_timed else None
        for precision in FUSED_PRECISIONS:
            if clock.is_over():
                return rows
            products = Products(precision)  # type: ignore[arg-type]
            error, reference = errors_of_square(precision, size, clock.device)
            row = {
                "N": size,
                "B": len(S),
                "precision": precision,
                "kernel": "fused" if products.can_fuse(S) else "torch",
                "error": error,
                "reference": reference,
                "is_right": error <= 1.05 * reference + TOLERANCE,
            }
            if is_timed:
                row["fp32"] = fp32
                row["ours"] = clock.milliseconds(
                    partial(products.square, S, out=out, alpha=0.5, addend=M, beta=0.5)
                )
                reference_call = partial(products._reference_square, S, out, 0.5, M, 0.5, 0.0, None)
                row["torch"] = clock.milliseconds(reference_call)
                rounded = products.round(S)
                row["bmm"] = clock.milliseconds(partial(products, rounded, rounded))
            rows.append(row)
    return rows


def square_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["N", "B", "precision", "kernel", "error", "torch's error", "right", "ms"]
    header += ["÷ torch's of that precision", "fp32 ÷ ours"]
    cells = []
    for row in rows:
        ours = row.get("ours")
        timed = ["–"] * 3
        if ours is not None:
            timed = [f"{ours:.3f}", f"{ours / row['torch']:.2f}", f"{row['fp32'] / ours:.2f}"]
        errors = [
            f"{row['error']:.1e}",
            f"{row['reference']:.1e}",
            "yes" if row["is_right"] else "NO",
        ]
        cells.append(
            [str(row["N"]), str(row["B"]), row["precision"], row["kernel"], *errors, *timed]
        )
    return step_time.table(header, cells)


# ----------------------------------------------------------------------------------- solvers


def solver_configs() -> dict[str, ds.RootInvConfig]:
    """Every solver, and minimax in every precision."""
    configs: dict[str, ds.RootInvConfig] = {
        "eigen": ds.EigenConfig(),
        "coupled_newton": ds.CoupledNewtonConfig(),
        "newton_db": ds.NewtonDBConfig(),
        "newton_schulz": ds.NewtonSchulzRootInvConfig(),
        "chebyshev": ds.ChebyshevConfig(),
    }
    for precision in ("auto", *FUSED_PRECISIONS):
        configs[f"minimax {precision}"] = ds.MinimaxConfig(
            relative_epsilon=1e-4,
            num_squarings=5,
            matmul_precision=precision,  # type: ignore[arg-type]
        )
    return configs


def solvers(
    size_table: Sizes, clock: Clock, peaks: dict[str, float]
) -> tuple[list[list[str]], dict[str, float]]:
    """Time of a stack's roots and the product rate that they reach; minimax's shares of the peak."""
    num_blocks, size = size_table.stack
    S = stack_of(num_blocks, size, clock.device)
    A, rows = S @ S, []
    shares: dict[str, float] = {}
    for name, config in solver_configs().items():
        if clock.is_over():
            rows.append([name, "left out: the time was spent", "–", "–"])
            continue
        elapsed = clock.milliseconds(partial(inverse_root, A, ROOT, config, 1e-10), repeats=3)
        cost = measure_solver(config, ROOT, 1e-10, torch.float32)
        rate = num_blocks * cost.matmul_flops(size) / (elapsed * 1e-3)
        precision = getattr(config, "matmul_precision", "fp32")
        peak = peaks.get("fp16x3" if precision == "auto" else precision)
        of_peak = f"{100.0 * rate / peak:.0f} %" if peak and cost.num_matmuls > 1 else "–"
        if peak and name.startswith("minimax"):
            shares[name] = rate / peak
        rows.append([name, f"{elapsed:.2f}", f"{rate / 1e12:.2f}", of_peak])
    return rows, shares


# ------------------------------------------------------------------------------------- steps


def reason_against(variant: step_time.Variant, values: Sequence[Tensor]) -> str:
    """Why an optimizer takes no step with a model, e.g. as its blocks must divide all dimensions; or ""."""
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()
    try:
        variant.make(parameters).step()
    except Exception as error:
        return f"{variant.name}: {type(error).__name__} {error}".strip()
    return ""


def steps(size_table: Sizes, clock: Clock) -> tuple[list[str], dict[str, list[Any]]]:
    """Tables of whole steps, and what was measured."""
    options = argparse.Namespace(
        device=clock.device,
        clock="cuda" if clock.device == "cuda" else "wall clock",
        frequencies=[1, 10],
        rounds=size_table.rounds,
        warmup=1,
        memory=True,
        threads=torch.get_num_threads(),
    )
    wanted = [n for n in PEERS if n in ("Muon", "AdamW") or n.startswith("DashGpu")]
    peers = [name for name in wanted if PEERS[name].is_importable()]
    parts, measured = [], {}
    for name, case in size_table.cases.items():
        parts.append(f"### `{name}`: {case.description}\n")
        if clock.is_over():
            parts.append("Left out: the time was spent.\n")
            continue
        variants = step_time.make_variants(case.block, STEP_CONFIGS, peers)
        values = make_parameters(case, clock.device)
        reasons = {v.name: reason_against(v, values) for v in variants}
        variants = [v for v in variants if not reasons[v.name]]
        step_time.run_case(case, variants, options)
        measured[name] = variants
        parts.append(step_time.absolute_table(variants, options.frequencies))
        parts.append(step_time.ratio_table(variants, options.frequencies))
        if refused := list(filter(None, reasons.values())):
            parts.append(f"Left out: {'; '.join(refused)}.\n")
    if missing := [name for name in wanted if name not in peers]:
        parts.append(f"Not importable here: {', '.join(missing)}.\n")
    return parts, measured


def draw(rows: Sequence[dict[str, Any]], measured: dict[str, list[Any]], path: Path) -> None:
    """Speed of the squares over fp32, and milliseconds of a step with a refresh."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for precision in FUSED_PRECISIONS:
        timed = [r for r in rows if r["precision"] == precision and "ours" in r]
        left.plot(
            [r["N"] for r in timed], [r["fp32"] / r["ours"] for r in timed], "o-", label=precision
        )
    left.set(
        xscale="log", xlabel="N", ylabel="times as fast as bmm in fp32", title="Square of a stack"
    )
    left.axhline(1.0, color="0.7", zorder=0)
    left.legend()
    bars = [
        (f"{case}: {v.name}", statistics.median(v.times[1]))
        for case, variants in measured.items()
        for v in variants
    ]
    right.barh([name for name, _ in bars], [value for _, value in bars])
    right.set(xscale="log", xlabel="ms", title="Step, refresh every 1")
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# -------------------------------------------------------------------------------------- main


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin nothing after these")
    parser.add_argument("--output", type=Path, help="the report; its plot lies beside it")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu --toy shows that it runs")
    name = step_time.processor(options.device).split(",")[0]
    options.hardware = name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
    default = RESULTS / f"gpu_{slug}_{datetime.date.today().isoformat()}.md"
    options.output = options.output or default
    options.words = list(words)
    return options


def peak_rates(hardware: str) -> dict[str, float]:
    """Peak rates by precision where the device is a known one."""
    known = [device for name, device in DEVICES.items() if name in hardware]
    if not known:
        return {}
    return dict(known[0].peak_flops) | {"fp32": known[0].peak_flops[precision_of(torch.float32)]}


def main(words: Sequence[str]) -> str:
    options = parse(words)
    size_table, clock = sizes(options.toy), Clock(options.device, options.seconds)
    begin = time.monotonic()
    square_rows = squares(size_table, clock)
    solver_rows, shares = solvers(size_table, clock, peak_rates(options.hardware))
    step_parts, measured = steps(size_table, clock)
    plot = options.output.with_suffix(".png")
    num_blocks, size = size_table.stack
    lines = [
        f"# {options.hardware}",
        "",
        f"- Date: {datetime.date.today().isoformat()}; {time.monotonic() - begin:.0f} s",
        f"- Command: `python benchmarks/gpu.py {' '.join(options.words)}`".replace("py `", "py`"),
        f"- Versions: dash_shampoo {ds.__version__}, base {ds.base.name}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}",
        "",
        bar_table(square_rows, shares if size >= 1024 else {}, measured),
        f"![Squares and steps]({plot.name})",
        "",
        "## Squares: S²/2 + M/2",
        "",
        square_table(square_rows),
        f"## Solvers: root {ROOT} of {num_blocks} matrices of {size}",
        "",
        step_time.table(["Solver", "ms", "TFLOP/s of products", "of the peak"], solver_rows),
        f"## Steps: median of {size_table.rounds} interleaved rounds",
        "",
        *step_parts,
    ]
    text = "\n".join(lines)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    draw(square_rows, measured, plot)
    print(text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
