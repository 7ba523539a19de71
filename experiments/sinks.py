"""Where records go beside the metrics file: TensorBoard, Weights & Biases."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments.metrics import FILE_NAME, MetricsFile
from experiments.settings import SettingsError

# Names under which the DASH repository logs the same, in Weights & Biases; milliseconds.
_DASH_KEYS = {
    "forward_ms": "elapsed/fw_step",
    "backward_ms": "elapsed/bw_step",
    "optimizer_ms": "elapsed/opt_step",
}


class Sink(Protocol):
    """Takes numbers by name."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Finish."""


class TensorBoard:
    """Event files below a run's folder.

    Args:
        folder: The run's folder.
        config: Its settings.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{dict(config)}\n```")

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project ``dash_shampoo``; the environment variables of wandb have their say.

    Args:
        folder: The run's folder; its name is the run's.
        config: Its settings.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="dash_shampoo", name=folder.name, dir=str(folder), config=dict(config)
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`; times have the names of the DASH repository too."""
        own = {f"train/{key}": name for key, name in _DASH_KEYS.items()}
        named = {own[name]: value for name, value in values.items() if name in own}
        self._run.log({**values, **named}, step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


_SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def open_sinks(names: list[str], folder: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Open the sinks of a run.

    Args:
        names: ``tensorboard``, ``wandb``.
        folder: The run's folder.
        config: Its settings.

    Returns:
        The sinks.

    Raises:
        SettingsError: If there is no such sink, or its package is missing.
    """
    sinks: list[Sink] = []
    for name in names:
        if name not in _SINKS:
            raise SettingsError(f"sinks={name} must be one of {', '.join(_SINKS)}.")
        try:
            sinks.append(_SINKS[name](folder, config))
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"sinks={name} needs the package {error.name}: pip install {name}."
            ) from error
    return sinks


class RunLog:
    """The metrics file of a run, and its sinks.

    Args:
        folder: The run's folder.
        start: The first record.
        resume: What to say of the checkpoint that the run goes on from, or None.
        sinks: See `open_sinks`.
    """

    def __init__(
        self,
        folder: Path,
        start: Mapping[str, Any],
        resume: Mapping[str, Any] | None,
        sinks: Sequence[Sink],
    ) -> None:
        path = folder / FILE_NAME
        is_new = resume is None or not path.is_file()
        self._file = MetricsFile(path, None if resume is None or is_new else resume["step"])
        self._sinks = sinks
        if is_new:
            self._file.write("start", **start)
        if resume is not None:
            self._file.write("resume", **resume)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Take a record.

        Args:
            event: Its kind.
            step: Its step.
            values: JSON values.
        """
        self._file.write(event, step=step, **values)
        for sink in self._sinks:
            sink.write(dict(numbers(event, values)), step)

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


def numbers(event: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a record.

    Args:
        event: Its kind, the first part of every name.
        values: Its values.

    Yields:
        (name, number).
    """
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{event}/{key}", float(value)
        elif key == "failures":
            yield f"{event}/failures", float(sum(value.values()))
