"""Finished and unfinished runs, read back from their folders."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.metrics import FILE_NAME, read_metrics

Record = Mapping[str, Any]

# Settings that do not tell one experiment from another: seeds repeat it, the others compute nothing.
_NOT_COMPARED = (
    "seed",
    "data_seed",
    "output_dir",
    "resume",
    "resume_from",
    "progress",
    "runs",
    "note",
    "sinks",
)


@dataclass(frozen=True)
class Run:
    """One run's records.

    Attributes:
        folder: Where they are.
        records: All of them, in order.
    """

    folder: Path
    records: Sequence[Record]

    @property
    def start(self) -> Record:
        """The first record: settings, versions, hardware."""
        return self.records[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What tells this experiment from others, by dotted name."""
        return {
            name: value
            for name, value in leaves(self.start["config"])
            if name.split(".")[0] not in _NOT_COMPARED
        }

    def of(self, event: str) -> list[Record]:
        """The records of one kind with a finite loss.

        Args:
            event: ``train`` or ``validation``.

        Returns:
            The records.
        """
        return [r for r in self.records if r["event"] == event and r.get("loss") is not None]

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do: the last step is taken, or the loss is not finite."""
        config = self.start["config"]
        last = min(config["steps"], config.get("stop_after") or config["steps"])
        steps = [r["step"] for r in self.of("validation")]
        return self.diverged or bool(steps and steps[-1] >= last)

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last step is not finite."""
        return self.records[-1]["event"] == "train" and self.records[-1]["loss"] is None


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seeds alone.

    Attributes:
        label: Name of the optimizer, and what tells it from the others.
        runs: One per seed.
    """

    label: str
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        """Name of the optimizer alone."""
        return str(self.runs[0].start.get("label", self.label))

    @property
    def final_losses(self) -> list[float]:
        """The last validation loss of each run that did not diverge."""
        return [
            r.of("validation")[-1]["loss"]
            for r in self.runs
            if not r.diverged and r.of("validation")
        ]

    @property
    def mean_loss(self) -> float:
        """Mean of the final losses; infinite where a run diverged."""
        losses = self.final_losses
        return statistics.fmean(losses) if len(losses) == len(self.runs) else float("inf")

    def mean(self, key: str) -> float:
        """Mean of a value of the training records over all runs, the first step left out.

        Args:
            key: Such as ``optimizer_ms``.

        Returns:
            The mean; 0 where there is no second step.
        """
        values = [
            r[key] for run in self.runs for r in run.of("train")[1:] if r.get(key) is not None
        ]
        return statistics.fmean(values) if values else 0.0


def read_run(folder: Path) -> Run | None:
    """A run's records.

    Args:
        folder: The run's folder.

    Returns:
        The run, or None where there is none yet.
    """
    path = folder / FILE_NAME
    records = read_metrics(path) if path.is_file() else []
    return Run(folder, records) if records and records[0]["event"] == "start" else None


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in folders and below them.

    Args:
        folders: Of runs, or of sweeps.

    Returns:
        Runs with at least one validation, in the order of their paths.
    """
    places = {path.parent for folder in folders for path in folder.rglob(FILE_NAME)}
    runs = [read_run(place) for place in sorted(places)]
    return [run for run in runs if run is not None and run.of("validation")]


def experiments(runs: Sequence[Run]) -> list[Experiment]:
    """Runs put together by their settings, the best first.

    Args:
        runs: Any.

    Returns:
        One experiment for each combination of settings.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = repr((run.start.get("label"), sorted(run.settings.items(), key=str)))
        groups.setdefault(key, []).append(run)
    found = [Experiment(_label(same, runs), same) for same in groups.values()]
    return sorted(found, key=lambda e: e.mean_loss)


def _label(same: Sequence[Run], runs: Sequence[Run]) -> str:
    name = same[0].start.get("label", same[0].folder.name)
    rivals = [run.settings for run in runs if run.start.get("label") == same[0].start.get("label")]
    differing = [
        f"{key.removeprefix('optimizer.')}={value}"
        for key, value in same[0].settings.items()
        if any(other.get(key) != value for other in rivals) and not key.endswith("_target_")
    ]
    return ", ".join([name, *differing])


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested settings by dotted names.

    Args:
        node: Nested dicts.
        prefix: Of the names.

    Yields:
        (name, value).
    """
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def first_reached(run: Run, loss: float) -> Record | None:
    """The first validation at or below a loss.

    Args:
        run: The run.
        loss: The level.

    Returns:
        The record, or None.
    """
    return next((r for r in run.of("validation") if r["loss"] <= loss), None)
