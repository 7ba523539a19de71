"""Time and memory of an optimizer step: DashShampoo, the base's own list, and optimizers of others.

All optimizers of a case take their steps in one interleaved run, in an order that is reversed every
round, so that whatever else the machine does falls on all of them alike. Given are medians, and ratios
taken round by round, with their quartiles. On one thread it is processor time, on several the wall
clock's. fp32, no distribution, gradients are given: forward and backward are not timed.

    python benchmarks/step_time.py --threads 1 --cases 146-of-64 --output table.md

Roots are refreshed every 1, 10 or 0 (never) steps: a measurement spans the steps from one refresh to the
next. Memory is counted, see `memory.py`, on one thread: what an optimizer keeps after three steps beside
parameters and gradients, and the most that a step with a refresh has allocated at a time.
"""

import argparse
import datetime
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from benchmarks.cases import CASES, Case, make_gradients, make_parameters, set_gradients
from benchmarks.memory import memory_of
from benchmarks.ours import CONFIGS, shampoo
from benchmarks.peers import NEVER, PEERS, Steppable

DEFAULT_CASES = ("256x64", "64x256", "146-of-64")


@dataclass
class Variant:
    """One optimizer of a case, and what was measured of it.

    Attributes:
        name (str): Its name in the table.
        solver (str): What it computes, by the name of our config or of its rivals.
        kind (str): "ours", "base" or "peer".
        make (Callable): Constructs it.
        times (dict): Milliseconds of a step, by how often roots are refreshed and round.
        construction (float): Seconds until it was constructed.
        state_bytes (int): What it keeps.
        peak_bytes (int): What a step allocates at most.
    """

    name: str
    solver: str
    kind: str
    make: Callable[[Sequence[torch.nn.Parameter]], Steppable]
    times: dict[int, list[float]] = field(default_factory=dict)
    construction: float = 0.0
    state_bytes: int = 0
    peak_bytes: int = 0


def make_variants(block: int, configs: Sequence[str], peers: Sequence[str]) -> list[Variant]:
    """The optimizers of a case: ours, the base's where it can, and those of others."""
    variants: list[Variant] = []
    for name in configs:
        config = CONFIGS[name]
        make = shampoo(ds.DashShampoo, config, block)
        variants.append(Variant(f"ours/{name}", name, "ours", make))
        if config.on_base:
            make = shampoo(ds.DistributedShampoo, config, block)
            variants.append(Variant(f"base/{name}", name, "base", make))
    for name in peers:
        peer = PEERS[name]
        variants.append(Variant(name, peer.solver, "peer", partial(peer.make, block)))
    return variants


def milliseconds(step: Callable[[], object], repetitions: int, clock: str) -> float:
    """Time of one call, mean over `repetitions`: of the processor, the wall clock, or the GPU."""
    if clock == "cuda":
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repetitions):
            step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / repetitions
    now = time.process_time if clock == "processor" else time.perf_counter
    start = now()
    for _ in range(repetitions):
        step()
    return (now() - start) * 1e3 / repetitions


def run_case(case: Case, variants: list[Variant], options: argparse.Namespace) -> None:
    """Measures every variant."""
    values = make_parameters(case, options.device)
    running: list[tuple[Variant, list[torch.nn.Parameter], Steppable]] = []
    for variant in variants:
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        # What is imported late is imported now.
        variant.make([torch.nn.Parameter(torch.ones(2, 2, device=options.device))])
        made: list[Steppable] = []
        construct = partial(lambda v, p, made: made.append(v.make(p)), variant, parameters, made)
        variant.construction = milliseconds(construct, 1, options.clock) / 1e3
        running.append((variant, parameters, made[0]))
    for frequency in options.frequencies:
        for number in range(options.warmup + options.rounds):
            gradients = make_gradients(values, seed=number)
            for variant, parameters, optimizer in running if number % 2 == 0 else running[::-1]:
                optimizer.set_frequency(frequency or NEVER)
                set_gradients(parameters, gradients)
                elapsed = milliseconds(optimizer.step, frequency or 5, options.clock)
                if number >= options.warmup:
                    variant.times.setdefault(frequency, []).append(elapsed)
    running.clear()
    if options.memory:
        torch.set_num_threads(1)
        for variant in variants:
            measure_memory(variant, values)
        torch.set_num_threads(options.threads)


def measure_memory(variant: Variant, values: Sequence[Tensor]) -> None:
    """Fills in what an optimizer keeps after three steps, and what another one allocates."""
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    set_gradients(parameters, make_gradients(values, 0))
    made: list[Steppable] = []

    def three_steps() -> None:
        made.append(variant.make(parameters))
        for _ in range(3):
            made[0].step()

    kept = memory_of(three_steps)
    gc.collect()
    variant.state_bytes = kept.live
    variant.peak_bytes = memory_of(made[0].step).peak


# ------------------------------------------------------------------------------------ tables


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    """Median of the rounds' ratios, and their quartiles."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    median = statistics.median(ratios)
    if len(ratios) < 4:
        return f"{median:.2f}"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def every(frequency: int) -> str:
    return f"every {frequency}" if frequency else "never"


def absolute_table(variants: Sequence[Variant], frequencies: Sequence[int]) -> str:
    header = ["Optimizer", *(f"refresh {every(f)}, ms" for f in frequencies)]
    header += ["state, MiB", "peak of a step, MiB", "construction, s"]
    rows = []
    for variant in variants:
        medians = [f"{statistics.median(variant.times[f]):.1f}" for f in frequencies]
        sizes = [f"{size / 2**20:.1f}" for size in (variant.state_bytes, variant.peak_bytes)]
        rows.append([variant.name, *medians, *sizes, f"{variant.construction:.2f}"])
    return table(header, rows)


def ratio_table(variants: Sequence[Variant], frequencies: Sequence[int]) -> str:
    """Ours over the base, over the fastest of the others with the same solver, and over the rest."""
    others = [v for v in variants if v.kind == "peer" and v.name in ("Muon", "AdamW")]
    header = ["Ours", "refresh", "÷ base", "÷ fastest peer of that solver", "which"]
    header += [f"÷ {other.name}" for other in others]
    rows = []
    for ours in (v for v in variants if v.kind == "ours"):
        for frequency in frequencies:
            time = ours.times[frequency]
            rival = CONFIGS[ours.solver].rival or ours.solver
            rivals = [v for v in variants if v.solver == rival and v.kind == "peer"]
            rivals.sort(key=lambda v: statistics.median(v.times[frequency]))
            bases = [v for v in variants if v.solver == ours.solver and v.kind == "base"]
            cells = [ratio(time, v.times[frequency]) for v in (*bases, *rivals[:1])]
            base = cells.pop(0) if bases else "–"
            which = [*cells, rivals[0].name.split("/")[0]] if rivals else ["–", "–"]
            cells = [ratio(time, other.times[frequency]) for other in others]
            rows.append([ours.solver, every(frequency), base, *which, *cells])
    return table(header, rows)


def processor(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def preface(options: argparse.Namespace) -> str:
    missing = [name for name in options.peers if name not in options.importable]
    lines = [
        "# Time of an optimizer step",
        "",
        f"- Date: {datetime.date.today().isoformat()}",
        f"- Hardware: {processor(options.device)}; {options.threads} threads of {os.cpu_count()}",
        f"- Versions: dash_shampoo {ds.__version__}, base {ds.base.name}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"- Command: `python benchmarks/step_time.py {' '.join(options.words)}`".replace(
            "py `", "py`"
        ),
        f"- Medians of {options.rounds} interleaved rounds after {options.warmup}, time by {options.clock}; "
        "ratios are medians of the rounds' ratios, with quartiles: below 1, ours is faster. fp32, Adam "
        "grafting where Shampoo's family takes any (SOAP, spectral and sign descent have none), every "
        "optimizer with its solver's defaults.",
        *([f"- Not importable here: {'; '.join(missing)}."] if missing else []),
        *(f"- `{name}`: {CONFIGS[name].make()}" for name in options.solvers),
        "",
    ]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- main


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=DEFAULT_CASES, help="sets of parameters")
    add("--solvers", nargs="*", choices=list(CONFIGS), default=list(CONFIGS), help="our configs")
    add("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="other optimizers")
    add(
        "--frequencies",
        nargs="+",
        type=int,
        default=[1, 10, 0],
        help="steps from one refresh to the next",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    add("--threads", type=positive, default=1, help="threads of the CPU")
    add("--rounds", type=positive, default=11, help="timed rounds of each case")
    add("--warmup", type=positive, default=2, help="rounds before them")
    add("--no-memory", dest="memory", action="store_false", help="leave the memory out")
    add("--output", type=Path, help="also write the tables to this file")
    add("--json", type=Path, help="also write the times of all rounds to this file")
    options = parser.parse_args(words)
    if min(options.frequencies) < 0:
        parser.error(f"--frequencies {options.frequencies}: must be at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    options.words = list(words)
    options.clock = "processor" if options.threads == 1 else "wall clock"
    options.clock = "cuda" if options.device == "cuda" else options.clock
    options.importable = [name for name in options.peers if PEERS[name].is_importable()]
    return options


def main(words: Sequence[str]) -> str:
    options = parse(words)
    torch.set_num_threads(options.threads)
    # glibc's malloc returns freed memory to the system, and every page costs again, until a process has
    # freed a block as large as this one; training does that in its first steps.
    torch.empty(31 * 2**18)
    # Both bases warn of every capped Newton iteration; writing that down would be timed too.
    logging.disable(logging.WARNING)
    report = [preface(options)]
    print(report[0], flush=True)
    measured = {}
    for name in options.cases:
        case = CASES[name]
        variants = make_variants(case.block, options.solvers, options.importable)
        run_case(case, variants, options)
        measured[name] = {v.name: {every(f): t for f, t in v.times.items()} for v in variants}
        parts = [absolute_table(variants, options.frequencies)]
        if options.solvers:
            parts.append(ratio_table(variants, options.frequencies))
        report += [f"## `{name}`: {case.description}\n", *parts]
        print("\n".join(report[-1 - len(parts) :]), flush=True)
    text = "\n".join(report)
    for path, content in ((options.output, text), (options.json, json.dumps(measured, indent=1))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
