"""The trainings of a study: done once, remembered in a file, found again by what they were."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.study.questions import TASKS
from experiments.study.sides import Side, digest
from experiments.tasks import Fit, Task, fit

_VALIDATIONS = 10
# How far a search for the learning rate may go from where it starts, in factors of two.
_FURTHEST = 5

Key = tuple[str, str, float, int]  # task, digest of the side, learning rate, seed


@dataclass(frozen=True)
class Result:
    """The runs of one side on one task, at the learning rate that other seeds chose.

    Attributes:
        lr: That learning rate.
        fits: One for each further seed.
    """

    lr: float
    fits: Sequence[Fit]

    @property
    def losses(self) -> list[float]:
        """The last loss of each."""
        return [one.loss for one in self.fits]

    @property
    def mean(self) -> float:
        """Mean of the last losses; infinity if one diverged."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Standard deviation of the last losses."""
        finite = len(self.losses) > 1 and math.isfinite(self.mean)
        return statistics.stdev(self.losses) if finite else math.nan

    @property
    def seconds(self) -> float:
        """Median processor time of a training."""
        return statistics.median(one.seconds[-1] for one in self.fits)


class Store:
    """All runs of a study, in a file of one JSON object a line.

    Args:
        path: The file; made at the first run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fits: dict[Key, Fit] = {}
        self._tasks: dict[tuple[str, bool], Task] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._remember(json.loads(line))

    def _remember(self, record: dict[str, Any]) -> Fit:
        key = (record["task"], record["side"], record["lr"], record["seed"])
        losses = tuple(math.inf if loss is None else loss for loss in record["losses"])
        steps, seconds = tuple(record["steps"]), tuple(record["seconds"])
        self._fits[key] = Fit(steps, losses, seconds, record["optimizer_seconds"])
        return self._fits[key]

    def find(self, task: str, side: Side, lr: float, seed: int) -> Fit | None:
        """A run, if it was done.

        Args:
            task: Name of the task.
            side: The optimizer.
            lr: Its learning rate.
            seed: Of weights and batches.

        Returns:
            How it went, or None.
        """
        return self._fits.get((task, digest(side), lr, seed))

    def run(self, task: str, label: str, side: Side, lr: float, seed: int) -> Fit:
        """A run, done now if it was not done yet.

        Args:
            task: Name of the task.
            label: Of the side, for those who read the file.
            side: The optimizer.
            lr: Its learning rate.
            seed: Of weights and batches.

        Returns:
            How it went.
        """
        if (known := self.find(task, side, lr, seed)) is not None:
            return known
        training = TASKS[task]
        kind = (task, side.as_matrices)
        if kind not in self._tasks:
            self._tasks[kind] = training.make(side.as_matrices)
        one = fit(
            self._tasks[kind],
            lambda model: side.build(model, lr, training.block),
            seed,
            validations=_VALIDATIONS,
        )
        record = {
            "task": task,
            "label": label,
            "side": digest(side),
            "lr": lr,
            "seed": seed,
            "steps": one.steps,
            "losses": [round(x, 5) if math.isfinite(x) else None for x in one.losses],
            "seconds": [round(x, 3) for x in one.seconds],
            "optimizer_seconds": round(one.optimizer_seconds, 3),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return self._remember(record)


def tune(loss: Callable[[float], float], start: float) -> float:
    """The learning rate, of start·2^i, whose loss is the lowest of its neighbours on both sides.

    Args:
        loss: Of a learning rate.
        start: Where to begin.

    Returns:
        The learning rate. At most 2^5 away from `start`.
    """
    tried = {i: loss(start * 2.0**i) for i in (-1, 0, 1)}
    while True:
        best = min(tried, key=lambda i: tried[i])
        step = next((i for i in (best - 1, best + 1) if i not in tried), None)
        if step is None or abs(step) > _FURTHEST:
            return start * 2.0**best
        tried[step] = loss(start * 2.0**step)


def result(
    store: Store,
    task: str,
    label: str,
    side: Side,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
) -> Result:
    """Tune a side's learning rate with some seeds, then train with others.

    Args:
        store: Where runs are remembered.
        task: Name of the task.
        label: Of the side.
        side: The optimizer.
        seeds: Of the runs that count.
        tuning_seeds: Of the runs whose mean loss chooses the learning rate; none of `seeds`.

    Returns:
        The runs that count.
    """

    def tried(lr: float) -> float:
        return statistics.fmean(store.run(task, label, side, lr, s).loss for s in tuning_seeds)

    lr = tune(tried, side.lr)
    return Result(lr, [store.run(task, label, side, lr, seed) for seed in seeds])


class MissingRunError(Exception):
    """A run that was not done yet."""


def known_result(
    store: Store, task: str, side: Side, seeds: Sequence[int], tuning_seeds: Sequence[int]
) -> Result | None:
    """As `result`, of the runs that were done.

    Args:
        store: Where runs are remembered.
        task: Name of the task.
        side: The optimizer.
        seeds: Of the runs that count.
        tuning_seeds: As of `result`.

    Returns:
        The runs that count, or None if one is missing.
    """

    def found(lr: float, seed: int) -> Fit:
        if (known := store.find(task, side, lr, seed)) is None:
            raise MissingRunError
        return known

    try:
        lr = tune(
            lambda lr: statistics.fmean(found(lr, seed).loss for seed in tuning_seeds), side.lr
        )
        return Result(lr, [found(lr, seed) for seed in seeds])
    except MissingRunError:
        return None
