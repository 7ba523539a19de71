"""``python -m experiments demo``: optimizers side by side on a tiny model.

All runs have the same initial weights and the same batches, and take turns, in an order that is
reversed every round, so that whatever else the machine does slows all of them alike.
"""

import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.builders import build_data
from experiments.environment import environment
from experiments.main import fail
from experiments.metrics import FILE_NAME, read_metrics
from experiments.parallel import Process, process_group
from experiments.plots import Curve, plot_losses, plot_step_times
from experiments.settings import overrides
from experiments.tables import markdown_table
from experiments.trainer import RunError, Trainer


@dataclass(frozen=True)
class Run:
    """One optimizer of the demo.

    Attributes:
        name: Its key in the YAML and its folder.
        label: Its name in the table.
        trainer: Its model, optimizer and data.
    """

    name: str
    label: str
    trainer: Trainer


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
        runs = _prepare(config, process, folder)
        first = runs[0].trainer
        print(
            f"{len(runs)} optimizers, {config.steps} steps each, "
            f"{first.num_parameters:,} parameters, {first.data.name}"
        )
        try:
            signal_number = _take_turns(runs, config.steps, config.turn, config.progress)
        except RunError as error:
            return fail(str(error), 1)
        if signal_number:
            return fail("stopped before the end; nothing to compare.", 128 + signal_number)
        _report(config, runs, process, folder, start)
    return 0


def _prepare(config: DictConfig, process: Process, folder: Path) -> list[Run]:
    data = build_data(config)
    runs = []
    for name, node in config.runs.items():
        own = compose("demo", [*node.overrides, *overrides(), "progress=false", "resume=never"])
        output_dir = folder / "runs" / str(name)
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True)
        runs.append(Run(str(name), str(node.label), Trainer(own, process, output_dir, data)))
    return runs


def _take_turns(runs: Sequence[Run], steps: int, turn: int, progress: bool) -> int:
    """Train all runs, each `turn` steps at a time; returns the signal that stopped them, or 0."""
    total = steps * len(runs)
    with tqdm(total=total, disable=None if progress else True, dynamic_ncols=True) as bar:
        for index, until in enumerate(range(turn, steps + turn, turn)):
            for one in runs if index % 2 == 0 else runs[::-1]:
                bar.set_description(one.name, refresh=False)
                result = one.trainer.run(until=until, bar=bar)
                if result.signal_number is not None:
                    return result.signal_number
    for one in runs:
        one.trainer.close()
    return 0


def _curve(one: Run, folder: Path) -> Curve:
    records = read_metrics(folder / "runs" / one.name / FILE_NAME)
    validations = [r for r in records if r["event"] == "validation"]
    steps = [r for r in records if r["event"] == "train"]
    period = int(one.trainer.config.optimizer.get("precondition_frequency", 1))
    return Curve(
        label=one.label,
        steps=[r["step"] for r in validations],
        seconds=[r["seconds"] for r in validations],
        losses=[r["loss"] for r in validations],
        model_ms=typical([r["forward_ms"] + r["backward_ms"] for r in steps], 1),
        optimizer_ms=typical([r["optimizer_ms"] for r in steps], period),
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
    config: DictConfig, runs: Sequence[Run], process: Process, folder: Path, start: float
) -> None:
    curves = [_curve(one, folder) for one in runs]
    losses, times = folder / "validation_loss.png", folder / "step_time.png"
    subject = f"Llama-style model, {runs[0].trainer.num_parameters / 1e6:.1f}M parameters"
    plot_losses(curves, losses, f"{subject}, {runs[0].trainer.data.name}")
    plot_step_times(curves, times, f"{subject}: time of a training step")
    table = demo_table(curves, [one.trainer.learning_rate.peaks[0] for one in runs])
    machine = environment(process.device)
    text = "\n".join(
        [
            "# Demo of dash_shampoo",
            "",
            table,
            _baseline_note(curves) + str(config.note).strip(),
            "",
            f"{subject}, {config.steps} steps of {config.batch_size} × {config.sequence_length} "
            f"tokens, {runs[0].trainer.data.name} (digest {runs[0].trainer.data.digest}), seed "
            f"{config.seed}. {machine['device']}, {machine['threads']} threads, torch "
            f"{machine['torch']}, Python {machine['python']}.",
            "",
            f"![validation loss]({losses.name})",
            "",
            f"![time of a step]({times.name})",
            "",
        ]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"\n{table}\nThis took {time.perf_counter() - start:.0f} s. Written:")
    for path in (folder / "README.md", losses, times):
        print(f"  {path}")


def _baseline_note(curves: Sequence[Curve]) -> str:
    return (
        f"The last two columns tell when a run first reached the final loss of {curves[0].label}, "
        f"{curves[0].losses[-1]:.3f}. "
    )


def demo_table(curves: Sequence[Curve], learning_rates: Sequence[float]) -> str:
    """The comparison in markdown; the first run is the baseline of the last two columns.

    Args:
        curves: The runs.
        learning_rates: The peak learning rate of each.

    Returns:
        The table.
    """
    target = curves[0].losses[-1]
    rows = []
    for curve, lr in zip(curves, learning_rates, strict=True):
        steps = _crossing(curve.steps, curve.losses, target)
        seconds = _crossing(curve.seconds, curve.losses, target)
        rows.append(
            [
                curve.label,
                f"{lr:g}",
                f"{curve.losses[-1]:.3f}",
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
