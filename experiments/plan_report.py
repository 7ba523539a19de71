"""A plan as plain-text tables, and as plain values for JSON."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from dash_shampoo.planning import (
    REFERENCE_CONDITION_NUMBER,
    SHARED,
    OptimizerPlan,
    RankPlan,
    balance,
)
from experiments.tables import markdown_table

_MAX_ROWS = 16
_GIB, _MIB, _TERA, _MILLI = 2**30, 2**20, 1e12, 1e-3

# Keys of the optimizer's state, in words.
_KINDS = {
    "factor_matrices": "factor matrices",
    "inv_factor_matrices": "inverse factors",
    "adagrad": "grafting, Adam",
    "filtered_grad": "gradient EMA",
    "momentum_buffer": "momentum",
    "weight_buffer": "averaging",
}
_PHASES = ("factor_update", "inverse_root", "precondition", "elementwise", "communication")

Column = tuple[str, Callable[[RankPlan], float], str]


def plan_text(plan: OptimizerPlan, names: str) -> str:
    """Tables of one plan.

    Args:
        plan: The plan.
        names: Names of the model and the optimizer.

    Returns:
        Lines of text.
    """
    return "\n".join(
        [
            _heading(plan, names),
            _inverse_roots(plan),
            _section("Blocks and work, per rank and step", plan, _overview(plan)),
            _section("Optimizer state, GiB per rank", plan, _state(plan)),
            _section("Matmuls, TFLOP per rank and step", plan, _flops(plan)),
            *_rooflines(plan),
            _balances(plan),
        ]
    )


def sweep_text(plans: Sequence[OptimizerPlan], names: str) -> str:
    """One table over several numbers of ranks.

    Args:
        plans: One per number of ranks.
        names: Names of the model and the optimizer.

    Returns:
        Lines of text.
    """
    header = (
        "ranks",
        "blocks max",
        "idle",
        "state GiB max",
        "total",
        "max/mean",
        "TFLOP max",
        "total",
        "max/mean",
        "received MiB",
        "ms",
    )
    rows = []
    for plan in plans:
        states = [rank.total_state_bytes for rank in plan.ranks]
        rows.append(
            (
                f"{len(plan.ranks)}",
                f"{max(rank.num_blocks for rank in plan.ranks)}",
                f"{plan.num_idle}",
                f"{max(states) / _GIB:.3f}",
                f"{sum(states) / _GIB:.2f}",
                f"{plan.state_balance:.2f}",
                f"{max(plan.flops) / _TERA:.3f}",
                f"{sum(plan.flops) / _TERA:.1f}",
                f"{plan.flops_balance:.2f}",
                f"{max(rank.received_bytes for rank in plan.ranks) / _MIB:.0f}",
                f"{plan.seconds / _MILLI:.2f}",
            )
        )
    first = plans[0]
    lines = [
        f"{names}: {first.num_parameters:,} parameters, {first.parallelism.strategy} on 1 to "
        f"{len(plans[-1].ranks)} ranks; {_circumstances(first)}\n",
        markdown_table(header, rows),
        "max and total are over the ranks, max/mean tells how uneven they are (1.00: even); ms is the\n"
        "roofline of the slowest rank's step: a lower bound.\n",
    ]
    return "\n".join(lines)


def plan_record(plan: OptimizerPlan) -> dict[str, Any]:
    """All numbers of a plan.

    Args:
        plan: The plan.

    Returns:
        Nested dicts and lists of plain values, in bytes, FLOPs and seconds.
    """
    return {
        **_summary(plan),
        "inverse_roots": [asdict(entry) for entry in plan.inverse_roots],
        "ranks": [
            {
                **asdict(rank),
                "total_state_bytes": rank.total_state_bytes,
                "matmul_flops": rank.step.matmul_flops,
                "seconds": rank.step.seconds,
            }
            for rank in plan.ranks
        ],
    }


def sweep_record(plans: Sequence[OptimizerPlan]) -> list[dict[str, Any]]:
    """The main numbers of several plans.

    Args:
        plans: One per number of ranks.

    Returns:
        One dict of plain values for each.
    """
    return [
        {
            **_summary(plan),
            "max_num_blocks": max(rank.num_blocks for rank in plan.ranks),
            "max_state_bytes": max(rank.total_state_bytes for rank in plan.ranks),
            "max_flops": max(plan.flops),
            "max_received_bytes": max(rank.received_bytes for rank in plan.ranks),
        }
        for plan in plans
    ]


def _summary(plan: OptimizerPlan) -> dict[str, Any]:
    return {
        "base": plan.base,
        "num_parameters": plan.num_parameters,
        **asdict(plan.parallelism),
        "device": plan.device.name if plan.device else None,
        "num_idle": plan.num_idle,
        "state_bytes": plan.state_bytes,
        "total_flops": sum(plan.flops),
        "state_balance": plan.state_balance,
        "flops_balance": plan.flops_balance,
        "seconds": plan.seconds,
    }


def _circumstances(plan: OptimizerPlan) -> str:
    device = f"roofline of {plan.device.description}" if plan.device else "no device"
    return f"base {plan.base}; {device}"


def _heading(plan: OptimizerPlan, names: str) -> str:
    number = len(plan.ranks)
    return (
        f"{names}: {plan.num_parameters:,} parameters, {plan.parallelism.strategy} on {number} "
        f"rank{'s' if number > 1 else ''}; {_circumstances(plan)}\n"
    )


def _inverse_roots(plan: OptimizerPlan) -> str:
    header = ("N", "root", "matrices", "every", "matmuls", "symmetric", "eigh", "GFLOP")
    rows = []
    for entry in plan.inverse_roots:
        cost, size = entry.cost, entry.size
        flops = cost.matmul_flops(size) + cost.eigendecomposition_flops(size)
        rows.append(
            (
                f"{size}",
                f"{entry.root:.4g}",
                f"{entry.num_matrices}",
                f"{entry.precondition_frequency}",
                f"{cost.num_matmuls + cost.num_columns / max(size, 1):.4g}",
                f"{cost.num_symmetric_matmuls:.4g}",
                f"{cost.num_eigendecompositions:.4g}",
                f"{flops / 1e9:.4g}",
            )
        )
    text = (
        "Inverse roots of all ranks: matrices, steps between refreshes, and for one refresh of one "
        "matrix\nthe matmuls (those of them with a symmetric product), eigendecompositions and GFLOP\n\n"
        + markdown_table(header, rows)
    )
    if any(entry.cost.depends_on_data for entry in plan.inverse_roots):
        text += (
            "The solver stops by a tolerance: counted at a condition number of "
            f"{REFERENCE_CONDITION_NUMBER:.0e}.\n"
        )
    return text


def _overview(plan: OptimizerPlan) -> list[Column]:
    return [
        ("blocks", lambda r: r.num_blocks, ".4g"),
        ("buckets", lambda r: r.num_buckets, ".4g"),
        ("stacks", lambda r: len(r.stacks), ".4g"),
        ("state GiB", lambda r: r.total_state_bytes / _GIB, ".3f"),
        ("buffer MiB", lambda r: r.buffer_bytes / _MIB, ".1f"),
        ("received MiB", lambda r: r.received_bytes / _MIB, ".1f"),
        ("matmul TFLOP", lambda r: r.step.matmul_flops / _TERA, ".4f"),
        ("ms", lambda r: r.step.seconds / _MILLI, ".2f"),
    ]


def _state(plan: OptimizerPlan) -> list[Column]:
    def column(kind: str) -> Column:
        return (_KINDS.get(kind, kind), lambda r: r.state_bytes.get(kind, 0) / _GIB, ".3f")

    # The step count and the like are a few bytes: in the total only.
    kinds = [kind for kind in dict.fromkeys([*_KINDS, *plan.state_bytes]) if kind != SHARED]
    return [
        *(column(kind) for kind in kinds if plan.state_bytes.get(kind)),
        ("total", lambda r: r.total_state_bytes / _GIB, ".3f"),
    ]


def _flops(plan: OptimizerPlan) -> list[Column]:
    columns: list[Column] = [
        ("factor update", lambda r: r.step.factor_update_flops / _TERA, ".4f"),
        ("inverse roots", lambda r: r.step.inverse_root_flops / _TERA, ".4f"),
        ("preconditioning", lambda r: r.step.precondition_flops / _TERA, ".4f"),
        ("total", lambda r: r.step.matmul_flops / _TERA, ".4f"),
    ]
    if any(rank.step.eigendecomposition_flops for rank in plan.ranks):
        columns.append(("eigh beside it", lambda r: r.step.eigendecomposition_flops / _TERA, ".4f"))
    return columns


def _rooflines(plan: OptimizerPlan) -> Iterable[str]:
    if plan.device is None:
        return

    def column(phase: str) -> Column:
        return (
            phase.replace("_", " "),
            lambda r: float(getattr(r.step, f"{phase}_seconds")) / _MILLI,
            ".3f",
        )

    title = f"Roofline on {plan.device.name}, ms per rank and step: a lower bound"
    columns = [column(phase) for phase in _PHASES]
    columns.append(("total", lambda r: r.step.seconds / _MILLI, ".3f"))
    yield _section(title, plan, columns)
    if any(rank.step.eigendecomposition_flops for rank in plan.ranks):
        yield "Eigendecompositions are far from the peak rate: expect many times their roofline.\n"


def _section(title: str, plan: OptimizerPlan, columns: Sequence[Column]) -> str:
    """A table with one row per rank, equal neighbours together, and the mean and the largest."""
    cells = [[format(value(rank), digits) for _, value, digits in columns] for rank in plan.ranks]
    rows = []
    first = 0
    for row, same in groupby(cells):
        last = first + len(list(same)) - 1
        rows.append([f"{first}" if first == last else f"{first}-{last}", *row])
        first = last + 1
    hidden = len(rows) - _MAX_ROWS
    if hidden > 0:
        rows = [*rows[:_MAX_ROWS], ["…", *("" for _ in columns)]]
    if len(plan.ranks) > 1:
        values = [[value(rank) for rank in plan.ranks] for _, value, _ in columns]
        for label, reduce in (("mean", lambda v: sum(v) / len(v)), ("max", max)):
            formats = [digits for _, _, digits in columns]
            rows.append([label, *map(format, map(reduce, values), formats)])
    note = f"{hidden} more rows; format=json has all.\n" if hidden > 0 else ""
    header = ["rank", *(name for name, _, _ in columns)]
    return f"{title}\n\n{markdown_table(header, rows)}{note}"


def _balances(plan: OptimizerPlan) -> str:
    seconds = balance([rank.step.seconds for rank in plan.ranks])
    stacks = ", ".join(
        f"{stack.num_matrices} of {stack.size}x{stack.size} (root {stack.root:.4g})"
        for stack in plan.ranks[0].stacks
    )
    return (
        f"Balance over ranks (max / mean): state {plan.state_balance:.3f}, FLOP "
        f"{plan.flops_balance:.3f}, time {seconds:.3f}; {plan.num_idle} without a block.\n"
        + textwrap.fill(f"Stacks of rank 0: {stacks or 'none'}.", 100, subsequent_indent="  ")
        + "\n"
    )
