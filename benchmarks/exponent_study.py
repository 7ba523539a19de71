"""Which root trains best: validation loss of exponents and solvers, with the real optimizer.

Two small tasks that any machine can run: a byte-level Llama on the Python standard library's sources,
and an MLP on scikit-learn's digits. Every method gets the same initial weights and batches, its own
learning rate (of a grid), Adam grafting and factor EMA 0.95.

    python benchmarks/exponent_study.py --tasks llama digits --seeds 0 1 2 --output benchmarks/results/...

Finished runs are appended to `<output>.jsonl`, so that an interrupted study goes on where it stopped;
`<output>.md` and `<output>.png` are drawn from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dash_shampoo as ds
from experiments.environment import processor
from experiments.tasks import DigitsTask, LlamaTask, Task, fit

Optimizer = torch.optim.Optimizer
Record = dict[str, Any]
Key = tuple[str, str, int]  # task, method, frequency
Best = dict[Key, tuple[float, dict[int, float]]]  # learning rate, loss by seed


@dataclass(frozen=True)
class Method:
    """A row of the table: how to build the optimizer, and which learning rates to try."""

    build: Callable[..., Optimizer]
    lrs: tuple[float, ...]


def shampoo(
    solver: ds.RootInvConfig, exponent: float, epsilon: float = 1e-10
) -> Callable[..., Optimizer]:
    """A constructor of DashShampoo with one solver and one exponent on each side of a matrix."""

    def build(params: Iterator[nn.Parameter], lr: float, frequency: int) -> Optimizer:
        return ds.DashShampoo(
            params,
            lr=lr,
            betas=(0.9, 0.95),
            epsilon=epsilon,
            max_preconditioner_dim=64,
            precondition_frequency=frequency,
            grafting_config=ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
            preconditioner_config=ds.RootInvShampooPreconditionerConfig(
                amortized_computation_config=solver,
                inverse_exponent_override={2: exponent},
                use_symmetric_packing=False,
            ),
        )

    return build


def default_dash(params: Iterator[nn.Parameter], lr: float, frequency: int) -> Optimizer:
    return ds.DashShampoo(
        params,
        lr=lr,
        betas=(0.9, 0.95),
        max_preconditioner_dim=64,
        precondition_frequency=frequency,
        grafting_config=ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
        preconditioner_config=ds.DefaultDashConfig,
    )


def adamw(params: Iterator[nn.Parameter], lr: float, frequency: int) -> Optimizer:
    del frequency
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


_POWER = ds.PowerIterationScaling(num_vectors=16, safety_factor=2.0)
_LRS = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04)
METHODS = {
    "AdamW": Method(adamw, _LRS),
    "eigen, 1/4, absolute 1e-10": Method(shampoo(ds.EigenConfig(), 0.25), _LRS),
    "coupled Newton, 10 steps, 1/4": Method(
        shampoo(ds.ScaledCoupledNewtonConfig(max_iterations=10), 0.25), _LRS
    ),
    "Newton-DB 10+10, 1/4": Method(shampoo(ds.NewtonDBConfig(scaling=_POWER), 0.25), _LRS),
    "minimax, 1/4, relative 1e-6": Method(
        shampoo(ds.MinimaxConfig(relative_epsilon=1e-6), 0.25), _LRS
    ),
    "Newton-DB 10, 1/2": Method(shampoo(ds.NewtonDBConfig(scaling=_POWER), 0.5), _LRS),
    "minimax, 1/2, relative 1e-3": Method(
        shampoo(ds.MinimaxConfig(relative_epsilon=1e-3), 0.5), _LRS
    ),
    "DefaultDashConfig (minimax, 1/2, relative 1e-4)": Method(default_dash, _LRS),
}
BASELINE = "eigen, 1/4, absolute 1e-10"


TASKS: dict[str, type[LlamaTask] | type[DigitsTask]] = {"llama": LlamaTask, "digits": DigitsTask}
FREQUENCIES = (1, 10)


def train(task: Task, method: Method, lr: float, frequency: int, seed: int) -> float:
    return fit(task, lambda model: method.build(model.parameters(), lr, frequency), seed)


def run_all(args: argparse.Namespace, log: Path) -> None:
    done = {tuple(record[k] for k in KEYS) for record in read(log)}
    for name in args.tasks:
        task = TASKS[name]()
        for seed in args.seeds:
            for method, frequency in itertools.product(METHODS, FREQUENCIES):
                if method == "AdamW" and frequency != 1:
                    continue  # it has no roots to refresh
                lrs = METHODS[method].lrs
                if seed != args.seeds[0]:
                    first = losses(read(log), args.seeds[0])[name, method, frequency]
                    lrs = tuple(sorted(first, key=first.__getitem__)[: args.learning_rates])
                for key in ((name, method, frequency, lr, seed) for lr in lrs):
                    if key not in done:
                        run_one(task, key, log)


def run_one(task: Task, key: tuple[str, str, int, float, int], log: Path) -> None:
    name, method, frequency, lr, seed = key
    started = time.perf_counter()
    loss = train(task, METHODS[method], lr, frequency, seed)
    with log.open("a") as file:
        file.write(json.dumps(dict(zip(KEYS, key, strict=True), loss=loss)) + "\n")
    print(f"{name} {method} every {frequency}, lr {lr}, seed {seed}: {loss:.4f}", end=" ")
    print(f"({time.perf_counter() - started:.1f} s)", flush=True)


KEYS = ("task", "method", "frequency", "lr", "seed")


def read(log: Path) -> list[Record]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def losses(records: list[Record], seed: int) -> dict[Key, dict[float, float]]:
    """The losses of one seed by learning rate, for each (task, method, frequency)."""
    found: dict[Key, dict[float, float]] = defaultdict(dict)
    for r in records:
        if r["seed"] == seed:
            found[r["task"], r["method"], r["frequency"]][r["lr"]] = r["loss"]
    return found


def best_runs(records: list[Record]) -> Best:
    """For each (task, method, frequency) the lr with the lowest mean loss, and its loss by seed."""
    runs: dict[Key, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        runs[r["task"], r["method"], r["frequency"]][r["lr"]][r["seed"]] = r["loss"]
    best = {}
    for key, by_lr in runs.items():
        # A learning rate counts only with as many seeds as the fullest one.
        seeds = max(len(losses) for losses in by_lr.values())
        full = {lr: losses for lr, losses in by_lr.items() if len(losses) == seeds}
        lr = min(full, key=lambda lr: statistics.fmean(full[lr].values()))
        best[key] = (lr, full[lr])
    return best


def cell(best: tuple[float, dict[int, float]]) -> str:
    lr, losses = best
    values = list(losses.values())
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {spread:.4f} (lr {lr:g})"


def difference(best: Best, key: Key, baseline_key: Key) -> str:
    if key not in best or baseline_key not in best or key == baseline_key:
        return "–"
    ours, theirs = best[key][1], best[baseline_key][1]
    gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return f"{statistics.fmean(gaps):+.4f}, {sum(g < 0 for g in gaps)} of {len(gaps)} seeds"


def report(records: list[Record]) -> str:
    best = best_runs(records)
    lines = [
        "# Which root trains best",
        "",
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"dash_shampoo {ds.__version__}; `python benchmarks/exponent_study.py`.",
        "",
        "Validation loss after 300 steps, mean ± standard deviation over the seeds, with the learning rate "
        "of a grid that had the lowest mean. Second figure: the mean difference to "
        f"*{BASELINE}* of the same seed, and on how many seeds the method was lower.",
    ]
    for task in sorted({key[0] for key in best}):
        frequencies = sorted({key[2] for key in best if key[0] == task})
        lines += ["", f"## {task}: {TASKS[task].__doc__}", ""]
        heads = "".join(f" every {f} | against the baseline |" for f in frequencies)
        lines += [f"| method | {heads.strip()}", "|---|" + "---|---|" * len(frequencies)]
        for method in METHODS:
            row = f"| {method} |"
            for f in frequencies:
                key = (task, method, f)
                shown = cell(best[key]) if key in best else "–"
                row += f" {shown} | {difference(best, key, (task, BASELINE, f))} |"
            lines.append(row)
    return "\n".join(lines) + "\n"


def plot(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = best_runs(records)
    tasks = sorted({key[0] for key in best})
    figure, axes = plt.subplots(1, len(tasks), figsize=(7 * len(tasks), 4.2), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for frequency, marker in ((1, "o"), (10, "s")):
            rows = [m for m in METHODS if (task, m, frequency) in best]
            means = [statistics.fmean(best[task, m, frequency][1].values()) for m in rows]
            errors = [
                statistics.stdev(v)
                if len(v := list(best[task, m, frequency][1].values())) > 1
                else 0.0
                for m in rows
            ]
            positions = [list(METHODS).index(m) + (0.1 if frequency == 10 else -0.1) for m in rows]
            axis.errorbar(
                means,
                positions,
                xerr=errors,
                fmt=marker,
                capsize=3,
                label=f"roots refreshed every {frequency} step{'s' if frequency > 1 else ''}",
            )
        axis.set_yticks(range(len(METHODS)), list(METHODS))
        axis.invert_yaxis()
        axis.set_xlabel("validation loss after 300 steps")
        axis.set_title(task)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    for axis in axes[0][1:]:
        axis.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates",
        type=int,
        default=2,
        help="how many of the first seed's best go on to the others",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", default="benchmarks/results/exponent_study", help="path without ending"
    )
    parser.add_argument(
        "--only-report", action="store_true", help="draw from the runs that are there"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log = Path(args.output + ".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    if not args.only_report:
        run_all(args, log)
    records = read(log)
    Path(args.output + ".md").write_text(report(records))
    plot(records, Path(args.output + ".png"))
    print(Path(args.output + ".md").read_text())


if __name__ == "__main__":
    main()
