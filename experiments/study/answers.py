"""The page of a study: a table and a picture for each question."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import dash_shampoo
from experiments.environment import environment
from experiments.plots import COLOURS
from experiments.study.questions import QUESTIONS, TASKS, Question
from experiments.study.runs import Result, Store, known_result
from experiments.tables import markdown_table

Answer = Mapping[str, Mapping[str, Result]]  # side, task


def answer(
    store: Store, question: Question, seeds: Sequence[int], tuning_seeds: Sequence[int]
) -> Answer:
    """What the runs that were done say to a question.

    Args:
        store: The runs.
        question: The question.
        seeds: Of the runs that count.
        tuning_seeds: Of those that chose the learning rate.

    Returns:
        Results by side and task, without those that have runs missing.
    """
    found: dict[str, dict[str, Result]] = {}
    for label, side in question.sides.items():
        for task in question.tasks:
            if (one := known_result(store, task, side, seeds, tuning_seeds)) is not None:
                found.setdefault(label, {})[task] = one
    return found


def write(store: Store, folder: Path, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> Path:
    """Write the page and its pictures.

    Args:
        store: The runs.
        folder: Where to.
        seeds: Of the runs that count.
        tuning_seeds: Of those that chose the learning rate.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = environment()
    lines = [
        "# What trains best",
        "",
        f"`python -m experiments study`; {machine['device']}, one thread, torch {machine['torch']}, "
        f"dash_shampoo {dash_shampoo.__version__} on the {machine['base']} base.",
        "",
        "Validation loss at the end, mean ± standard deviation over "
        f"{len(seeds)} seeds, of which none chose the learning rate: that was done with "
        f"{len(tuning_seeds)} other, by factors of two, until both neighbours were worse. Per seed all "
        "sides have the same weights and batches, a warm-up of a tenth, a cosine to a tenth, gradients "
        "clipped at 1 and no decay. In brackets the learning rate and the processor seconds of a "
        "training. Runs that are missing are left out.",
        "",
        *(f"- **{name}**: {task.what}; blocks up to {task.block}." for name, task in TASKS.items()),
    ]
    for name, question in QUESTIONS.items():
        found = answer(store, question, seeds, tuning_seeds)
        if not found:
            continue
        picture = folder / f"{name}.png"
        _draw(question, found, picture)
        lines += ["", f"## {question.title}", "", _table(question, found)]
        lines += [f"![{question.title}]({picture.name})"]
    page = folder / "README.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _asked(question: Question, found: Answer) -> list[str]:
    return [task for task in question.tasks if any(task in row for row in found.values())]


def _table(question: Question, found: Answer) -> str:
    tasks = _asked(question, found)
    best = {
        task: min((row[task].mean for row in found.values() if task in row), default=math.inf)
        for task in tasks
    }
    rows = []
    for label, row in found.items():
        cells = [_cell(row[task], best[task]) if task in row else "" for task in tasks]
        rows.append([label, *cells])
    return markdown_table(["", *tasks], rows)


def _cell(one: Result, best: float) -> str:
    if not math.isfinite(one.mean):
        return f"diverged ({one.lr:g})"
    mean = f"**{one.mean:.4f}**" if one.mean == best else f"{one.mean:.4f}"
    return f"{mean} ± {one.deviation:.4f} ({one.lr:g}, {one.seconds:.1f} s)"


def _draw(question: Question, found: Answer, path: Path) -> None:
    """Loss by side; where time matters, loss against seconds."""
    tasks = _asked(question, found)
    figure, axes = plt.subplots(
        2,
        len(tasks),
        figsize=(3.6 * len(tasks) + 2.0, 3.2 + 0.28 * len(found)),
        squeeze=False,
        layout="constrained",
    )
    labels = list(found)
    for column, task in enumerate(tasks):
        bars, curves = axes[0][column], axes[1][column]
        for place, label in enumerate(labels):
            if task not in found[label] or not math.isfinite(found[label][task].mean):
                continue
            one, colour = found[label][task], COLOURS[place % len(COLOURS)]
            bars.errorbar(one.mean, place, xerr=one.deviation, fmt="o", color=colour)
            bars.plot(one.losses, [place] * len(one.losses), "|", color=colour)
            losses, seconds = _mean_curve(one)
            style = "-" if place < len(COLOURS) else "--"
            curves.plot(seconds, losses, style, color=colour, label=label)
        bars.set(title=task, yticks=range(len(labels)), ylim=(len(labels) - 0.5, -0.5))
        bars.set_yticklabels(labels if column == 0 else [], fontsize=7)
        curves.set(xlabel="processor seconds", ylabel="validation loss" if column == 0 else "")
        curves.set_yscale("log")
        for axis in (bars, curves):
            axis.grid(alpha=0.3)
            axis.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean_curve(one: Result) -> tuple[list[float], list[float]]:
    """Mean losses and seconds at the steps at which all runs were validated: not all versions do it alike."""
    shared = sorted(set.intersection(*(set(fit.steps) for fit in one.fits)))

    def means(values: Sequence[Sequence[float]]) -> list[float]:
        by_step = [
            dict(zip(f.steps, v, strict=True)) for f, v in zip(one.fits, values, strict=True)
        ]
        return [statistics.fmean(found[step] for found in by_step) for step in shared]

    return means([fit.losses for fit in one.fits]), means([fit.seconds for fit in one.fits])
