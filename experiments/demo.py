"""``python -m experiments demo``: optimizers side by side on a tiny model.

All runs have the same initial weights and the same batches, and take turns, in an order that is
reversed every round, so that whatever else the machine does slows all of them alike.
"""

import importlib.util
import logging
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.builders import build_data
from experiments.composition import overrides
from experiments.environment import environment
from experiments.main import fail
from experiments.metrics import FILE_NAME, read_metrics
from experiments.parallel import Process, process_group
from experiments.plots import COLOURS, Curve, plot_losses, plot_step_times
from experiments.settings import SettingsError
from experiments.tables import markdown_table
from experiments.trainer import RunError, Trainer

# Settings that change nothing of what the note says about the learning rates.
_HARMLESS = ("output_dir=", "progress=", "device=", "num_threads=", "turn=", "~runs.")


@dataclass
class Run:
    """One optimizer of the demo.

    Attributes:
        name: Its key in the YAML and its folder.
        label: Its name in the table.
        trainer: Its model, optimizer and data.
        colour: In the pictures.
        diverged: Whether its loss is no longer finite.
    """

    name: str
    label: str
    trainer: Trainer
    colour: str
    diverged: bool = False


def run(config: DictConfig) -> int:
    """Compare.

    Args:
        config: The composed settings.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    logging.getLogger("dash_shampoo").setLevel(logging.ERROR)
    start = time.perf_counter()
    folder = Path(config.output_dir)
    with process_group(config.parallelism, config.device) as process:
        runs, missing = _prepare(config, process, folder)
        first = runs[0].trainer
        print(
            f"{len(runs)} optimizers, {config.steps} steps each, "
            f"{first.num_parameters:,} parameters, {first.data.name}"
        )
        for note in missing:
            print(note)
        if signal_number := _take_turns(runs, config.steps, config.turn, config.progress):
            return fail("stopped before the end; nothing to compare.", 128 + signal_number)
        text, files = _report(config, runs, missing, process, folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"\n{_table_of(text)}\nThis took {time.perf_counter() - start:.0f} s. Written:")
    for path in (folder / "README.md", *files):
        print(f"  {path}")
    return 0


def _prepare(config: DictConfig, process: Process, folder: Path) -> tuple[list[Run], list[str]]:
    """The runs, and a note about each that can't be."""
    if not config.runs:
        raise SettingsError("runs is empty: there is nothing to compare.")
    data = build_data(config)
    own = [*overrides(), "progress=false", "resume=never"]
    if not any(word.startswith("evaluate_every=") for word in own):
        # Ten points make a curve, however short the run.
        own.append(f"evaluate_every={max(1, min(config.evaluate_every, config.steps // 10))}")
    runs, missing = [], []
    for place, (name, node) in enumerate(config.runs.items()):
        if (module := node.get("needs")) and importlib.util.find_spec(module) is None:
            missing.append(f"{node.label} is left out: the package {module} is not installed.")
            continue
        output_dir = folder / "runs" / str(name)
        shutil.rmtree(output_dir, ignore_errors=True)
        label = str(node.label)
        settings = compose("demo", [*node.overrides, *own])
        trainer = Trainer(settings, process, output_dir, label, data)
        runs.append(Run(str(name), label, trainer, COLOURS[place % len(COLOURS)]))
    return runs, missing


def _take_turns(runs: Sequence[Run], steps: int, turn: int, progress: bool) -> int:
    """Train all runs, each `turn` steps at a time; returns the signal that stopped them, or 0."""
    total = steps * len(runs)
    with tqdm(total=total, disable=None if progress else True, dynamic_ncols=True) as bar:
        for index, until in enumerate(range(turn, steps + turn, turn)):
            for one in runs if index % 2 == 0 else runs[::-1]:
                if one.diverged:
                    continue
                bar.set_description(one.name, refresh=False)
                try:
                    result = one.trainer.run(until=until, bar=bar)
                except RunError:
                    one.diverged = True
                    continue
                if result.signal_number is not None:
                    return result.signal_number
    for one in runs:
        one.trainer.close()
    return 0


def _curve(one: Run, folder: Path) -> Curve:
    records = read_metrics(folder / "runs" / one.name / FILE_NAME)
    validations = [r for r in records if r["event"] == "validation" and r["loss"] is not None]
    steps = [r for r in records if r["event"] == "train"]
    period = int(one.trainer.config.optimizer.get("precondition_frequency", 1))
    return Curve(
        label=one.label,
        steps=[r["step"] for r in validations],
        seconds=[r["seconds"] for r in validations],
        losses=[r["loss"] for r in validations],
        model_ms=typical([r["forward_ms"] + r["backward_ms"] for r in steps], 1),
        optimizer_ms=typical([r["optimizer_ms"] for r in steps], period),
        colour=one.colour,
        diverged=one.diverged,
    )


def typical(times: Sequence[float], period: int) -> float:
    """Time of a step where every `period`-th does more work: a mean, but robust to outliers.

    The mean over the places in the period of the median of the steps at that place. The first
    step, which allocates states, is left out where there are others.

    Args:
        times: One per step.
        period: Steps from one of the longer ones to the next.

    Returns:
        The time, in the unit of `times`.
    """
    counted = times[1:] or times
    places = [counted[place::period] for place in range(period)]
    return statistics.fmean(statistics.median(place) for place in places if place)


def _report(
    config: DictConfig,
    runs: Sequence[Run],
    missing: Sequence[str],
    process: Process,
    folder: Path,
) -> tuple[str, tuple[Path, Path]]:
    """The text of the report, after drawing its pictures."""
    curves = [_curve(one, folder) for one in runs]
    losses, times = folder / "validation_loss.png", folder / "step_time.png"
    first = runs[0].trainer
    subject = f"Llama-style model, {first.num_parameters / 1e6:.1f}M parameters"
    plot_losses(curves, losses, f"{subject}, {first.data.name}")
    plot_step_times(curves, times, f"{subject}: time of a training step")
    machine = environment(process.device)
    notes = [baseline_note(curves), _settings_note(runs)]
    if not [word for word in overrides() if not word.startswith(_HARMLESS)]:
        notes.append(str(config.note).strip())
    text = "\n".join(
        [
            "# Demo of dash_shampoo",
            "",
            demo_table(curves, [one.trainer.learning_rate.peaks[0] for one in runs]),
            " ".join([*notes, *missing]),
            "",
            f"{subject}, {config.steps} steps of {config.batch_size} × {config.sequence_length} "
            f"tokens, {first.data.name} (digest {first.data.digest}), seed {config.seed}. "
            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, Python "
            f"{machine['python']}, base {machine['base']}.",
            "",
            f"![validation loss]({losses.name})",
            "",
            f"![time of a step]({times.name})",
            "",
        ]
    )
    return text, (losses, times)


def _table_of(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


def baseline_note(curves: Sequence[Curve]) -> str:
    """What the last two columns of the table tell.

    Args:
        curves: The runs; the first is the baseline.

    Returns:
        A sentence.
    """
    if curves[0].diverged:
        return f"{curves[0].label} diverged, so there is no baseline to reach."
    if not curves[0].learned:
        return (
            f"{curves[0].label} ended at {curves[0].losses[-1]:.3f}, above the {curves[0].losses[0]:.3f} "
            "of the untrained model, so there is no baseline to reach."
        )
    return (
        f"The last two columns tell when a run first reached the final loss of {curves[0].label}, "
        f"{curves[0].losses[-1]:.3f}, on straight lines between validations."
    )


def _settings_note(runs: Sequence[Run]) -> str:
    """What is true of these runs, from their own settings."""
    first = runs[0].trainer.config
    note = "All runs have the same initial weights and batches."
    shampoos: dict[tuple[int, int], list[str]] = {}
    for one in runs:
        node: Any = one.trainer.config.optimizer
        if "max_preconditioner_dim" in node:
            key = (int(node.max_preconditioner_dim), int(node.precondition_frequency))
            shampoos.setdefault(key, []).append(one.label)
    for (block, frequency), labels in shampoos.items():
        every = "in every step" if frequency == 1 else f"every {frequency} steps"
        if len(shampoos) == 1:
            note += (
                f" Every kind of Shampoo works on blocks of {block} and renews its roots {every}."
            )
        else:
            note += f" Blocks of {block}, roots renewed {every}: {'; '.join(labels)}."
    rare = max([1, *(frequency for _, frequency in shampoos)])
    if first.steps > 2 * rare > 2:
        note += (
            " Milliseconds are medians of the steps at the same place between two renewals, averaged "
            "over the places."
        )
    return note


def demo_table(curves: Sequence[Curve], learning_rates: Sequence[float]) -> str:
    """The comparison in markdown; the first run is the baseline of the last two columns.

    Args:
        curves: The runs.
        learning_rates: The peak learning rate of each.

    Returns:
        The table.
    """
    target = curves[0].losses[-1] if curves[0].learned else -math.inf
    rows = []
    for curve, lr in zip(curves, learning_rates, strict=True):
        steps = _crossing(curve.steps, curve.losses, target)
        seconds = _crossing(curve.seconds, curve.losses, target)
        rows.append(
            [
                curve.label,
                f"{lr:g}",
                "diverged" if curve.diverged else f"{curve.losses[-1]:.3f}",
                f"{curve.model_ms:.0f}",
                f"{curve.optimizer_ms:.1f}",
                "-" if steps is None else f"{steps:.0f}",
                "-" if seconds is None else f"{seconds:.1f}",
            ]
        )
    header = [
        "optimizer",
        "lr",
        "validation loss",
        "model ms/step",
        "optimizer ms/step",
        "steps to baseline",
        "seconds to baseline",
    ]
    return markdown_table(header, rows)


def _crossing(xs: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Where a curve, drawn with straight lines, first reaches the target; None if it does not."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(xs[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return None
