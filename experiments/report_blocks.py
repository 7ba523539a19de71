"""Heat maps of the page about runs: failures, conditions and updates, by parameter and step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from experiments.runs import Experiment, Record


@dataclass(frozen=True)
class Kind:
    """What a heat map shows of a block.

    Attributes:
        title: Of the map.
        value: Of a block's record, or None.
        is_log: Whether powers of ten are shown.
    """

    title: str
    value: Callable[[Record], float | None]
    is_log: bool = True


def _worst(name: str) -> Callable[[Record], float | None]:
    def value(block: Record) -> float | None:
        values = [f[name] for f in block["factors"] if f[name] is not None]
        return max(values, default=None)

    return value


_KINDS = (
    Kind("condition of the factor matrices", _worst("condition")),
    Kind("residual of the roots in use", _worst("residual")),
    Kind("size of the update beside the weights", lambda block: block["update_to_weight"]),
    Kind("steps since the last good root", _worst("steps_since_good_root"), is_log=False),
)


def block_maps(experiment: Experiment) -> list[go.Figure]:
    """Heat maps of the first seed that has records of blocks.

    Args:
        experiment: Its runs.

    Returns:
        One figure per number that there is; rows are parameters, of several blocks the worst.
    """
    for run in experiment.runs:
        records = [r for r in run.records if r["event"] == "diagnostics"]
        if records:
            return [f for kind in _KINDS if (f := _map(kind, records)) is not None]
    return []


def _map(kind: Kind, records: Sequence[Record]) -> go.Figure | None:
    names = list(dict.fromkeys(block["parameter"] for r in records for block in r["blocks"]))
    columns = [_by_parameter(kind, record["blocks"]) for record in records]
    names = [name for name in names if any(name in column for column in columns)]
    if not names:
        return None
    rows = [[column.get(name) for column in columns] for name in names]
    shown = [[_shown(value, kind.is_log) for value in row] for row in rows]
    return heat_map(shown, rows, [r["step"] for r in records], names, kind.title, kind.is_log)


def _by_parameter(kind: Kind, blocks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for block in blocks:
        if (value := kind.value(block)) is not None:
            name = block["parameter"]
            worst[name] = max(value, worst.get(name, value))
    return worst


def _shown(value: float | None, is_log: bool) -> float | None:
    if value is None or (is_log and value <= 0):
        return None
    return round(math.log10(value), 3) if is_log else value


def failure_map(experiment: Experiment) -> go.Figure | None:
    """New failures between two records by parameter, of the first seed that has any.

    Args:
        experiment: Its runs.

    Returns:
        The figure, or None where every root was accepted.
    """
    for run in experiment.runs:
        records = [r for r in run.records if r["event"] == "validation" and r.get("failures")]
        if records:
            break
    else:
        return None
    names = list(dict.fromkeys(name for r in records for name in r["failures"]))
    counts = [[r["failures"].get(name, 0) for r in records] for name in names]
    new = [[b - a for a, b in zip([0, *row], row, strict=False)] for row in counts]
    return heat_map(new, new, [r["step"] for r in records], names, "roots not accepted", False)


def heat_map(
    colours: Sequence[Sequence[float | None]],
    values: Sequence[Sequence[float | None]],
    steps: Sequence[int],
    names: Sequence[str],
    title: str,
    is_log: bool,
) -> go.Figure:
    """A heat map over steps and parameters.

    Args:
        colours: What is drawn, a row per parameter.
        values: What is told of it.
        steps: Of the columns.
        names: Of the rows.
        title: Above it.
        is_log: Whether `colours` are powers of ten.

    Returns:
        The figure.
    """
    bar: dict[str, Any] = {"thickness": 10, "outlinewidth": 0}
    present = [value for row in colours for value in row if value is not None]
    low, high = min(present, default=0.0), max(present, default=1.0)
    if is_log:
        ticks = [low + (high - low) * i / 4 for i in range(5 if high > low else 1)]
        bar |= {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    figure = go.Figure(
        go.Heatmap(
            z=colours,
            # Categories: columns of one width, however far apart their steps.
            x=[f"{step:,}" for step in steps],
            y=names,
            text=[[None if v is None else f"{v:.3g}" for v in row] for row in values],
            hovertemplate="%{y}<br>step %{x}: %{text}<extra></extra>",
            colorscale="YlOrRd",
            colorbar=bar,
            zmin=low if is_log else 0,
            zmax=high if high > low else low + 1,
        )
    )
    figure.update_layout(title={"text": title, "font": {"size": 13}}, height=120 + 15 * len(names))
    figure.update_xaxes(title="steps", type="category", nticks=6)
    figure.update_yaxes(automargin=True, autorange="reversed", tickfont={"size": 9}, dtick=1)
    return figure
