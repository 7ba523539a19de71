"""Kernel launches, host synchronisations, passes and memory of an optimizer step, counted on the CPU.

The step takes its CUDA branches, see `device_counts.py`; nothing is timed, and the counts are the same
on every machine.

    python benchmarks/launches.py
    python benchmarks/launches.py --configs newton_db minimax --operations 20
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import dash_shampoo as ds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.cases import CASES, Case, make_gradients, make_parameters
from benchmarks.device_counts import Counts, DeviceCounts
from benchmarks.ours import CONFIGS

# Innermost function first; among the expressions that match it, the first.
PHASES = {
    r"(Adagrad|SGD|RMSprop|Adam|Grafting)\w*\.(update|precondition)": "grafting",
    r"(^|\.)_?(gather\w*|merge_and_block_gradients)$": "gather",
    r"(^|\.)_?(refresh\w*|settle\w*|inverse_root)$": "roots",
    r"\._update_factor_matrices$|\.update_preconditioners$": "factor update",
    r"\.(precondition|_precondition_piece)$": "precondition",
    r"_precondition_and_graft\w*$": "grafting",
    r"\.update_params$": "update",
}
PHASE_NAMES = [
    "gather", "factor update", "roots", "precondition", "grafting", "elementwise", "update",
]  # fmt: skip


def count_steps(
    case: Case, optimizer_class: type[ds.DistributedShampoo], **settings: Any
) -> tuple[Counts, Counts]:
    """Counts two steps of an optimizer that has taken two before.

    Args:
        case: Parameters and block size.
        optimizer_class: Class of the optimizer.
        settings: Further arguments of the optimizer.

    Returns:
        The counts of a step with a refresh, and of one without.
    """
    values = make_parameters(case, "cpu")
    gradients = [make_gradients(values, seed) for seed in range(4)]
    device = DeviceCounts(PHASES, default="elementwise")
    device.place(chain(values, *gradients))
    with device, warnings.catch_warnings():
        # Autocast, which is switched off for the solvers, finds no CUDA.
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        parameters = [torch.nn.Parameter(value) for value in values]
        defaults: dict[str, Any] = dict(
            lr=1e-3,
            betas=(0.9, 0.95),
            epsilon=1e-10,
            weight_decay=0.01,
            max_preconditioner_dim=case.block,
            precondition_frequency=2,
            start_preconditioning_step=2,
            grafting_config=ds.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8),
            # One group needs no stream of its own, and the CPU has none.
            concurrency_config=ds.ConcurrencyConfig(enable_cuda_stream_for_param_groups=False),
        )
        optimizer = optimizer_class(parameters, **(defaults | settings))
        counts = []
        for step in range(4):
            for parameter, gradient in zip(parameters, gradients[step], strict=True):
                parameter.grad = gradient
            device.reset()
            optimizer.step()
            counts.append(device.counts)
    return counts[3], counts[2]


def factor_elements(case: Case) -> int:
    """The elements of all factor matrices, unpacked: what one pass over all stacks reads."""
    total = 0
    for shape, count in case.shapes:
        for index, size in enumerate(shape):
            cuts = [case.block] * (size // case.block) + [size % case.block]
            others = math.prod(-(-n // case.block) for n in shape[:index] + shape[index + 1 :])
            total += count * others * sum(cut**2 for cut in cuts)
    return total


def rows_of(case_name: str, name: str, num_operations: int) -> list[str]:
    """Lines of the table: a step with a refresh, and one without."""
    case = CASES[case_name]
    config = CONFIGS[name].make()
    lines = []
    both = count_steps(case, ds.DashShampoo, preconditioner_config=config)
    for is_refresh, counts in zip((True, False), both, strict=True):
        launches = [counts.launches[phase] for phase in PHASE_NAMES]
        passes = counts.elements["roots"] / factor_elements(case)
        cells = [
            name,
            "yes" if is_refresh else "no",
            sum(launches),
            *launches,
            sum(counts.waits.values()),
            f"{passes:.1f}" if is_refresh else "–",
            f"{counts.peak_bytes / 2**20:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for (phase, operation), number in counts.operations.most_common(num_operations):
            lines.append(f"    {phase}: {number} {operation}")
    return lines


def main(words: Sequence[str]) -> str:
    """Prints the table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", choices=list(CASES), default="458-of-128", help="parameters")
    names = [name for name, config in CONFIGS.items() if not config.matrices_alone]
    parser.add_argument("--configs", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--operations", type=int, default=0, help="print so many frequent operations"
    )
    options = parser.parse_args(words)
    logging.disable(logging.WARNING)
    columns = ["Config", "Refresh", "Launches", *PHASE_NAMES, "Waits", "Passes", "Peak, MiB"]
    lines = [
        f"{CASES[options.case].description}: a step of DashShampoo, base {ds.base.name}, torch "
        f"{torch.__version__}. Waits are host synchronisations; passes are those of a refresh over all "
        "stacks, beside its products; peak is of what the step allocates.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name in options.configs:
        lines += rows_of(options.case, name, options.operations)
    print("\n".join(lines))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
