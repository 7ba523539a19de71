"""``python -m experiments report``: runs side by side, on one page that needs no network."""

import html
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from experiments.command_line import Parser
from experiments.plots import COLOURS
from experiments.report_blocks import block_maps, failure_map
from experiments.runs import Experiment, Run, experiments, find_runs, first_reached
from experiments.settings import SettingsError
from experiments.tables import spread

_AXES = {"step": "steps", "seconds": "seconds of training", "tokens": "tokens"}
_PHASES = {"forward_ms": "forward", "backward_ms": "backward", "optimizer_ms": "optimizer"}
_ABOVE = {"orientation": "h", "y": 1.0, "yanchor": "bottom"}
_CONFIG = {"responsive": True, "displayModeBar": False}
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th, td { vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td:first-child, .words { white-space: normal; overflow-wrap: anywhere; }
.words { display: block; text-align: left; }
.scroll { overflow-x: auto; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.pairs { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.pictures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem; }
@media screen and (max-width: 50rem) {
  body:not(.paper) :is(.pictures, .pairs) { grid-template-columns: minmax(0, 1fr); } }
.note { color: #555; } @page { margin: 14mm; }
body.paper { margin: 0; padding: 0; width: 180mm; max-width: none; font-size: 11px; }
.paper table { font-size: 9px; } .paper :is(th, td) { padding: .15rem .3rem; white-space: normal; }
@media print { h2, h3 { break-after: avoid; } .picture, tr { break-inside: avoid; } }
"""
# A picture keeps the width that it was drawn in: for paper it is drawn anew, and again afterwards.
_SCRIPT = """\
const draw = (own) => document.querySelectorAll(".js-plotly-plot").forEach((plot) =>
  Plotly.relayout(plot, {width: own ? plot.parentElement.clientWidth : null, autosize: !own}));
addEventListener("beforeprint", () => { document.body.classList.add("paper"); draw(true); });
addEventListener("afterprint", () => { document.body.classList.remove("paper"); draw(false); });
"""


def main(words: Sequence[str]) -> int:
    """Carry out ``report``.

    Args:
        words: The command line after ``report``.

    Returns:
        Exit status, as of `experiments.main.main`.

    Raises:
        SettingsError: If there are no runs.
    """
    parser = Parser(prog="python -m experiments report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUNS", help="of runs or of sweeps"
    )
    parser.add_argument(
        "--out", type=Path, help="HTML file (default: report.html in the first folder)"
    )
    arguments = parser.parse_args(words)
    for folder in arguments.folders:
        if not folder.is_dir():
            raise SettingsError(f"There is no folder {folder}.")
    runs = find_runs(arguments.folders)
    if not runs:
        raise SettingsError(f"There is no run in {', '.join(map(str, arguments.folders))}.")
    out = write(experiments(runs), arguments.out or arguments.folders[0] / "report.html")
    print(f"{len(runs)} runs: {out}")
    return 0


def write(found: Sequence[Experiment], out: Path) -> Path:
    """Write the page.

    Args:
        found: The best first.
        out: Its place.

    Returns:
        Its place.

    Raises:
        SettingsError: If it can't be written.
    """
    try:
        out.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{out} can't be written: {error.strerror}.") from error
    return out


def page(found: Sequence[Experiment]) -> str:
    """The page.

    Args:
        found: The best first.

    Returns:
        HTML with everything in it.
    """
    names = list(dict.fromkeys(e.name for e in found))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    best = [next(e for e in found if e.name == name) for name in names]
    curves = "".join(_picture(_losses(best, colours, axis)) for axis in _AXES)
    pictures = f'{_legend(best, colours)}<div class="pictures">{curves}</div>{_note(found, best)}'
    failures = "".join(_blocks(e, [f]) for e in best if (f := failure_map(e)) is not None)
    blocks = "".join(_blocks(e, maps) for e in best if (maps := block_maps(e)))
    rates = _against_rate(found, colours)
    sections = [
        ("Summary", _summary(found, colours)),
        ("Validation loss", pictures),
        ("Final loss by learning rate", _picture(rates) if rates else ""),
        ("Time of a step", _picture(_step_times(best))),
        ("Inverse roots that were not accepted", failures),
        ("Blocks and roots", blocks),
        ("Settings", _settings(found)),
        ("Versions and hardware", _machines(found)),
    ]
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in sections if text)
    count = sum(len(e.runs) for e in found)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dash_shampoo: runs</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{count} runs of dash_shampoo</h1>{body}<script>{_SCRIPT}</script></body></html>"
    )


def _picture(figure: go.Figure) -> str:
    top = 40 if figure.layout.title.text or figure.layout.legend.y else 20
    figure.update_layout(
        template="plotly_white", margin={"l": 55, "r": 15, "t": top, "b": 45}, font={"size": 12}
    )
    text = figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
    return f'<div class="picture">{text}</div>'


def _blocks(experiment: Experiment, figures: Sequence[go.Figure]) -> str:
    """Heat maps of an experiment, two in a row where there are several."""
    pictures = "".join(map(_picture, figures))
    layout = "pairs" if len(figures) > 1 else "single"
    return f'<h3>{html.escape(experiment.label)}</h3><div class="{layout}">{pictures}</div>'


def _losses(found: Sequence[Experiment], colours: dict[str, str], axis: str) -> go.Figure:
    """Mean over the seeds, with a band from the lowest to the highest."""
    figure = go.Figure()
    for experiment in found:
        places = _by_step(experiment.runs)
        xs = [statistics.fmean(r[axis] for r in records) for records in places]
        losses = [[r["loss"] for r in records] for records in places]
        colour = colours[experiment.name]
        if len(experiment.runs) > 1:
            outline = [*map(max, losses), *reversed([min(values) for values in losses])]
            figure.add_scatter(
                x=[*xs, *reversed(xs)],
                y=outline,
                fill="toself",
                line={"width": 0},
                fillcolor=colour,
                opacity=0.2,
                hoverinfo="skip",
                showlegend=False,
            )
        figure.add_scatter(
            x=xs,
            y=[statistics.fmean(values) for values in losses],
            name=experiment.label,
            line={"color": colour, "width": 2},
            mode="lines+markers",
            marker={"size": 4},
        )
    shown = [v for e in found for r in e.runs for v in [x["loss"] for x in r.of("validation")][1:]]
    if shown:
        margin = 0.05 * max(max(shown) - min(shown), 1e-3)
        figure.update_yaxes(range=[min(shown) - margin, max(shown) + margin])
    figure.update_layout(height=360, showlegend=False)
    figure.update_xaxes(title=_AXES[axis], rangemode="tozero")
    figure.update_yaxes(title="nats per token")
    return figure


def _by_step(runs: Sequence[Run]) -> list[list[Any]]:
    """The validations of several seeds, those of a step together."""
    steps: dict[int, list[Any]] = {}
    for run in runs:
        for record in run.of("validation"):
            steps.setdefault(record["step"], []).append(record)
    return [steps[step] for step in sorted(steps)]


def _step_times(found: Sequence[Experiment]) -> go.Figure:
    figure = go.Figure()
    labels = [e.label for e in found]
    for (key, name), colour in zip(_PHASES.items(), ("#bdbdbd", "#8c8c8c", "#0072b2"), strict=True):
        values = [e.mean(key) for e in found]
        figure.add_bar(y=labels, x=values, name=name, orientation="h", marker={"color": colour})
    figure.update_layout(barmode="stack", height=120 + 32 * len(found), legend=_ABOVE)
    figure.update_xaxes(title="milliseconds, mean over all steps but the first of a run")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _summary(found: Sequence[Experiment], colours: dict[str, str]) -> str:
    finite = [e.mean_loss for e in found if math.isfinite(e.mean_loss)]
    target = max(finite, default=math.inf)
    rows = []
    for e in found:
        reached = [first_reached(run, target) for run in e.runs]
        perplexities = [math.exp(min(loss, 700.0)) for loss in e.final_losses]
        rows.append(
            [
                f"{_swatch(colours[e.name])}{html.escape(e.label)}",
                str(len(e.runs)),
                spread(e.final_losses, "{:.4f}") or "diverged",
                spread(perplexities, "{:.2f}"),
                *(
                    spread([r[key] for r in reached if r is not None], form)
                    for key, form in (("step", "{:.0f}"), ("seconds", "{:.1f}"))
                ),
                f"{e.mean('optimizer_ms'):.1f}",
                f"{e.mean('forward_ms') + e.mean('backward_ms'):.1f}",
                f"{max(r['peak_memory_mib'] for run in e.runs for r in run.of('train')):.0f}"
                if any(run.of("train") for run in e.runs)
                else "",
            ]
        )
    header = [
        "experiment", "seeds", "validation loss", "perplexity", f"steps to {target:.3f}",
        "seconds to it", "optimizer ms", "model ms", "peak MiB",
    ]  # fmt: skip
    note = (
        "Mean ± standard deviation over the seeds." if any(len(e.runs) > 1 for e in found) else ""
    )
    return _table(header, rows) + f'<p class="note">{note}</p>'


def _legend(best: Sequence[Experiment], colours: dict[str, str]) -> str:
    entries = (f"{_swatch(colours[e.name])}{html.escape(e.label)}" for e in best)
    return "<p>" + " &emsp; ".join(entries) + "</p>"


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _note(found: Sequence[Experiment], best: Sequence[Experiment]) -> str:
    parts = []
    if len(best) < len(found):
        parts.append("Of each optimizer the best settings are drawn.")
    if any(len(e.runs) > 1 for e in best):
        parts.append("Lines are means over the seeds, bands reach from the lowest to the highest.")
    return f'<p class="note">{" ".join(parts)}</p>' if parts else ""


def _against_rate(found: Sequence[Experiment], colours: dict[str, str]) -> go.Figure | None:
    """The final loss of every experiment over its learning rate, where that was varied."""
    points: dict[str, dict[float, list[float]]] = {}
    for e in found:
        if math.isfinite(e.mean_loss):
            rate = float(e.runs[0].settings.get("optimizer.lr", 0.0))
            points.setdefault(e.name, {}).setdefault(rate, []).append(e.mean_loss)
    if max((len(rates) for rates in points.values()), default=0) < 2:
        return None
    figure = go.Figure()
    for name, rates in points.items():
        xs = sorted(rates)
        figure.add_scatter(
            x=xs,
            y=[min(rates[x]) for x in xs],
            name=name,
            mode="lines+markers",
            line={"color": colours[name]},
        )
    figure.update_layout(height=360)
    figure.update_xaxes(title="learning rate", type="log")
    figure.update_yaxes(title="nats per token, the best of the other settings")
    return figure


def _settings(found: Sequence[Experiment]) -> str:
    """What differs, and what all have in common."""
    first = [e.runs[0].settings for e in found]
    names = list(dict.fromkeys(name for settings in first for name in settings))
    differing = [n for n in names if len({repr(s.get(n)) for s in first}) > 1]
    rows = [
        [html.escape(e.label), f'<span class="words">{html.escape(_words(s, differing))}</span>']
        for e, s in zip(found, first, strict=True)
    ]
    table = _table(["experiment", "what differs"], rows) if differing else ""
    common = _words(first[0], [n for n in names if n not in differing])
    return f'{table}<p class="note">The same in all: {html.escape(common)}</p>'


def _words(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={settings[name]}" for name in names if name in settings)


def _machines(found: Sequence[Experiment]) -> str:
    keys = ("device", "world_size", "threads", "torch", "python", "dash_shampoo", "base", "data")
    rows = {tuple(str(run.start.get(k, "–")) for k in keys) for e in found for run in e.runs}
    return _table(list(keys), [list(row) for row in sorted(rows)], html.escape)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], shown: Callable[[str], str] = str
) -> str:
    head = "".join(
        f'<th><span class="{"words" if cell == "what differs" else ""}">{html.escape(cell)}</span></th>'
        for cell in header
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{shown(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
