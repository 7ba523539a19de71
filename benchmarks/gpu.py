"""Everything that is to be known of one GPU, by one command of about eight minutes.

    python benchmarks/gpu.py                 # writes benchmarks/results/gpu_<device>_<date>.md
    python benchmarks/gpu.py --device cpu --toy --output /tmp/x.md

1. Our kernels (squares, factor updates, both sides of a block) against torch's products: errors against
   float64, ragged sizes too, and times of the device, which finds the launches in its queue.
2. Every solver on one stack: time, and the share of the device's product rate that it reaches.
3. The step of one of eight ranks of Llama-953M, blocks of 1024 and 2048, and of GPT-2 124M on one GPU,
   refreshed every 1 and 10 steps, beside the sequential list of the base in use, Muon, AdamW, and DashGpu
   if importable.

Without a GPU it runs at toy sizes, so that it is known to run; its times then mean nothing. The report is
written after every part. A part that would begin after the time is spent is left out, one that fails too, and
an optimizer that takes no step with a model; the report says so. At its top stand the bars of `gpu_bars.py`,
and whether they are met.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from benchmarks import step_time
from benchmarks.cases import Case, Shapes, llama, make_parameters
from benchmarks.gpu_kernels import Clock, brief, kernel_table, measured_kernels, release, stack_of
from benchmarks.gpu_report import Report, draw, head_of, peak_rates
from benchmarks.ours import CONFIGS, shampoo
from benchmarks.peers import PEERS
from benchmarks.rank_share import blocks_of_rank
from dash_shampoo.inverse_root import inverse_root
from dash_shampoo.inverse_root.minimax.rounding import resolved
from dash_shampoo.inverse_root.minimax.solve import table_of
from dash_shampoo.planning.solver_cost import measure_solver
from dash_shampoo.products.fused import FUSED_PRECISIONS

RESULTS = Path(__file__).parent / "results"
ROOT = 2
# The sequential list of the base has what the embedded one and Meta's both have.
STEP_CONFIGS = ("default", "minimax", "minimax_auto", "newton_db", "coupled_newton")


LEAST_SIZE_OF_SHARES = 1024


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        squares (tuple): N of the squares that are timed.
        ragged (tuple): N of those whose errors alone are looked at.
        stack (tuple): B and N of the solvers' stack.
        cases (dict): Cases of whole steps.
        frequencies (tuple): After how many steps roots are refreshed.
        rounds (int): Of whole steps.
    """

    squares: tuple[int, ...]
    ragged: tuple[int, ...]
    stack: tuple[int, int]
    cases: dict[str, Case]
    frequencies: tuple[int, ...]
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
        return Sizes((16, 32), (7, 33), (2, 16), {"toy": toy}, (1, 2), rounds=1)
    model = llama(16, 2048, 32000)
    # In the order of what is to be known first.
    cases = {
        "llama-953m-1024": share(model, 1024, 8, "Llama-953M"),
        "gpt2-124m": Case("GPT-2 124M on one GPU, block 1024", gpt2(), 1024),
        "llama-953m-2048": share(model, 2048, 8, "Llama-953M"),
    }
    return Sizes(
        (64, 128, 256, 512, 1024, 2048), (100, 507, 1000), (16, 1024), cases, (1, 10), rounds=3
    )


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
    size_table: Sizes, clock: Clock, peaks: dict[str, float], shares: dict[str, float]
) -> Iterator[list[str]]:
    """Rows of a stack's roots: time, and the product rate that they reach; fills in minimax's shares."""
    num_blocks, size = size_table.stack
    S = stack_of(num_blocks, size, clock.device)
    A = S @ S
    for name, config in solver_configs().items():
        if clock.is_over():
            yield [name, "left out: the time was spent", "–", "–"]
            continue
        try:
            elapsed = clock.milliseconds(partial(inverse_root, A, ROOT, config, 1e-10), repeats=3)
        except RuntimeError as error:
            yield [name, f"failed: {brief(error)}", "–", "–"]
            continue
        cost = measure_solver(config, ROOT, 1e-10, torch.float32)
        rate = num_blocks * cost.matmul_flops(size) / (elapsed * 1e-3)
        precision = getattr(config, "matmul_precision", "fp32")
        if isinstance(config, ds.MinimaxConfig):
            of_polynomial = table_of(config, Fraction(ROOT)).error
            precision = resolved(config.matmul_precision, A, of_polynomial, 1e-4)
        peak = peaks.get(precision)
        of_peak = f"{100.0 * rate / peak:.0f} %" if peak and cost.num_matmuls > 1 else "–"
        if peak and name.startswith("minimax"):
            shares[name] = rate / peak
        yield [name, f"{elapsed:.2f}", f"{rate / 1e12:.2f}", of_peak]


# ------------------------------------------------------------------------------------- steps


def reason_against(variant: step_time.Variant, values: Sequence[Tensor]) -> str:
    """Why an optimizer takes no step with a model, e.g. as its blocks must divide all dimensions; or ""."""
    try:
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value.clone()
        variant.make(parameters).step()
    except Exception as error:
        return f"{variant.name}: {brief(error)}"
    finally:
        parameters = []
        release()
    return ""


def run_steps(case: Case, variants: list[step_time.Variant], options: argparse.Namespace) -> str:
    """Measures all optimizers interleaved, or one by one where they don't fit into memory together.

    Returns:
        What the report has to say about that.
    """
    try:
        step_time.run_case(case, variants, options)
    except torch.OutOfMemoryError:
        message = "They did not fit into memory together: timed one by one, not interleaved.\n"
    else:
        return ""
    for variant in variants:
        release()
        variant.times.clear()
        step_time.run_case(case, [variant], options)
    return message


def steps_of_case(
    case: Case,
    clock: Clock,
    size_table: Sizes,
    measured: Callable[[list[step_time.Variant]], None],
) -> Iterator[str]:
    """Tables of whole steps of one case."""
    options = argparse.Namespace(
        device=clock.device,
        clock="cuda" if clock.device == "cuda" else "wall clock",
        frequencies=list(size_table.frequencies),
        rounds=size_table.rounds,
        # A graph is recorded in the second step of its kind.
        warmup=3 if clock.device == "cuda" else 0,
        memory=True,
        threads=torch.get_num_threads(),
    )
    variants = step_time.make_variants(case.block, STEP_CONFIGS, importable_peers())
    has_cuda: bool = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    if clock.device == "cuda" and has_cuda:
        capturing = partial(ds.DashShampoo, capturable=True)
        make = shampoo(capturing, CONFIGS["default"], case.block)
        variants.append(step_time.Variant("ours/default, captured", "default", "ours", make))
    values = make_parameters(case, clock.device)
    # Kernels are compiled here, before anything is timed.
    reasons = {v.name: reason_against(v, values) for v in variants}
    variants = [v for v in variants if not reasons[v.name]]
    note = run_steps(case, variants, options)
    measured(variants)
    yield step_time.absolute_table(variants, options.frequencies)
    yield step_time.ratio_table(variants, options.frequencies)
    yield note
    if refused := list(filter(None, reasons.values())):
        yield f"Left out: {'; '.join(refused)}.\n"


def wanted_peers() -> list[str]:
    """Those that are compared with: of DashGpu the solvers that our steps take."""
    return [
        name
        for name, peer in PEERS.items()
        if name in ("Muon", "AdamW") or (name.startswith("DashGpu") and peer.solver in STEP_CONFIGS)
    ]


def importable_peers() -> list[str]:
    """Those of them that are here."""
    return [name for name in wanted_peers() if PEERS[name].is_importable()]


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


def main(words: Sequence[str]) -> str:
    options = parse(words)
    size_table, clock = sizes(options.toy), Clock(options.device, options.seconds)
    report = Report(options, head_of(options))
    num_blocks, size = size_table.stack
    # Both bases warn of every capped Newton iteration; writing that down would be timed too.
    logging.disable(logging.WARNING)
    try:
        with report.part("## Kernels: S²/2 + M/2, .95 F + .05 GGᵀ, XᵀGX\n"):
            report.rows += measured_kernels(size_table.squares, size_table.ragged, clock)
            report.add(kernel_table(report.rows))
        with report.part(f"## Solvers: root {ROOT} of {num_blocks} matrices of {size}\n"):
            # The bar is for large matrices.
            shares = report.shares if size >= LEAST_SIZE_OF_SHARES else {}
            peaks = peak_rates(options.hardware)
            rows = list(solvers(size_table, clock, peaks, shares))
            header = ["Solver", "ms", "TFLOP/s of products", "of the peak"]
            report.add(step_time.table(header, rows))
        report.add(f"## Steps: median of {size_table.rounds} interleaved rounds\n")
        for name, case in size_table.cases.items():
            with report.part(f"### `{name}`: {case.description}\n"):
                if clock.is_over():
                    report.add("Left out: the time was spent.\n")
                    continue
                keep = partial(report.measured.__setitem__, name)
                for text in filter(None, steps_of_case(case, clock, size_table, keep)):
                    report.add(text)
        if missing := sorted(set(wanted_peers()) - set(importable_peers())):
            report.add(f"Not importable here: {', '.join(missing)}.\n")
        draw(report.rows, report.measured, options.output.with_suffix(".png"))
    finally:
        logging.disable(logging.NOTSET)
    return report.write()


if __name__ == "__main__":
    main(sys.argv[1:])
