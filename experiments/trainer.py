"""The training loop."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from tqdm import tqdm

from experiments import checkpoint
from experiments.builders import (
    build,
    build_data,
    build_optimizer,
    optimizer_family,
    parameter_groups,
)
from experiments.data import BatchSampler, TokenData
from experiments.environment import environment
from experiments.metrics import FILE_NAME, MetricsFile, Stopwatch, peak_memory_mib
from experiments.model import count_parameters
from experiments.parallel import Process, gradient_sync, parallelise
from experiments.schedule import LearningRate
from experiments.settings import Precision, Resume, SettingsError, plain
from experiments.signals import StopRequest

# A continued run must agree in these, or the batches and the model would be other ones.
_FIXED_ON_RESUME = (
    "model",
    "data",
    "parameter_groups",
    "seed",
    "sequence_length",
    "batch_size",
    "precision",
)


class DivergedError(Exception):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: Steps taken in all.
        validation_loss: The last one measured, NaN if none.
        seconds: Seconds spent in training steps.
        signal_number: The signal that stopped the run early, or None.
        checkpoint: The last checkpoint written or read, or None.
    """

    step: int
    validation_loss: float
    seconds: float
    signal_number: int | None
    checkpoint: Path | None


class Trainer:
    """A model, an optimizer and data, and the loop over them.

    Args:
        config: The composed configuration of ``train``.
        process: This process.
        output_dir: Where metrics and checkpoints go; the same on all processes.
        data: Tokens, where the caller has them already; otherwise the group ``data`` is loaded.

    Raises:
        SettingsError: If settings contradict each other or the checkpoint.
    """

    def __init__(
        self,
        config: DictConfig,
        process: Process,
        output_dir: Path,
        data: TokenData | None = None,
    ) -> None:
        if config.batch_size % process.world_size:
            raise SettingsError(
                f"batch_size={config.batch_size} must be a multiple of the number of "
                f"processes, {process.world_size}."
            )
        self.config = config
        self.process = process
        self.checkpoints = output_dir / "checkpoints"
        self.data = data if data is not None else build_data(config)
        self.train_sampler = self._sampler(self.data.train)
        self.validation_sampler = self._sampler(self.data.validation)

        torch.manual_seed(config.seed)
        model = build(
            config.model,
            "model",
            vocab_size=self.data.vocab_size,
            max_sequence_length=config.sequence_length,
        )
        dtype = torch.float64 if config.precision == Precision.fp64 else torch.float32
        model.to(device=process.device, dtype=dtype)
        self.num_parameters = count_parameters(model)
        self.model, distributed_config = parallelise(model, config.parallelism, process)
        groups = parameter_groups(model, config.parameter_groups)
        self.optimizer = build_optimizer(config.optimizer, groups, distributed_config)
        factor = build(config.schedule, "schedule")
        self.learning_rate = LearningRate(self.optimizer, config.steps, factor)
        try:
            self.learning_rate.apply(0)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self._averaging_mode("train")
        if config.compile:
            model.compile()
        self.step = 0
        self._unlogged_steps = 0
        self._watch = Stopwatch(process.device)
        self.seconds = 0.0
        self.validation_loss = math.nan
        self.last_checkpoint = self._resume()
        self.metrics = self._open_metrics(output_dir) if process.is_first else None

    def _sampler(self, tokens: Tensor) -> BatchSampler:
        config = self.config
        return BatchSampler(tokens, config.sequence_length, config.batch_size, config.seed)

    def _averaging_mode(self, mode: str) -> None:
        """Optimizers that average iterates keep other weights for evaluation than for training."""
        if switch := getattr(self.optimizer, mode, None):
            switch()

    # Checkpoints

    def _resume(self) -> Path | None:
        latest = checkpoint.find_latest(self.checkpoints)
        resume = self.config.resume
        if resume == Resume.always and latest is None:
            raise SettingsError(f"resume=always, but there is no checkpoint in {self.checkpoints}.")
        if resume == Resume.never and self.process.is_first:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        if resume == Resume.never or latest is None:
            return None
        try:
            state = checkpoint.read(latest)
            self._check_same_run(state, latest)
            self.train_sampler.load_state_dict(state["sampler"])
            checkpoint.restore(latest, state, self.model, self.optimizer)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        torch.set_rng_state(state["rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.validation_loss = state["validation_loss"]
        return latest

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        saved, current = state["config"], plain(self.config)
        pairs = [(key, saved[key], current[key]) for key in _FIXED_ON_RESUME]
        pairs.append(("optimizer", state["optimizer_family"], optimizer_family(self.optimizer)))
        for key, before, now in pairs:
            if before != now:
                raise SettingsError(
                    f"{path} was written with {key}={before}, this run has {key}={now}. Use the "
                    "same, another output_dir, or resume=never."
                )

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Returns:
            Its folder.
        """
        self.last_checkpoint = checkpoint.save(
            self.checkpoints,
            self.step,
            self.model,
            self.optimizer,
            {
                "seconds": self.seconds,
                "validation_loss": self.validation_loss,
                "sampler": dict(self.train_sampler.state_dict()),
                "rng": torch.get_rng_state(),
                "optimizer_family": optimizer_family(self.optimizer),
                "config": plain(self.config),
            },
        )
        checkpoint.prune(self.checkpoints, self.config.keep_checkpoints)
        return self.last_checkpoint

    def _open_metrics(self, output_dir: Path) -> MetricsFile:
        resumed = self.last_checkpoint is not None
        metrics = MetricsFile(output_dir / FILE_NAME, self.step if resumed else None)
        if resumed:
            metrics.write("resume", step=self.step)
        else:
            metrics.write(
                "start",
                **environment(self.process.device, self.process.world_size),
                data=self.data.name,
                data_digest=self.data.digest,
                parameters=self.num_parameters,
                config=plain(self.config),
            )
        return metrics

    # The loop

    def run(self, until: int | None = None, bar: "tqdm[Any] | None" = None) -> TrainResult:
        """Train up to the last step, or until a signal asks to stop.

        Args:
            until: Return after this step already; a later call goes on.
            bar: A progress bar of the caller's, instead of one of this run.

        Returns:
            How it ended.

        Raises:
            DivergedError: If the loss is not finite.
        """
        config = self.config
        last = config.steps if until is None else min(until, config.steps)
        hidden = not (config.progress and self.process.is_first)
        bar = bar or tqdm(
            total=config.steps, initial=self.step, disable=hidden or None, dynamic_ncols=True
        )
        with StopRequest() as stop:
            if self.step == 0:
                self._validate(bar)
            while self.step < last:
                self._train_step(bar)
                bar.update()
                done = self.step == config.steps
                if done or _is_due(self.step, config.evaluate_every):
                    self._validate(bar)
                stopped = self._is_logged() and self.process.any(stop.signal_number is not None)
                if done or stopped or _is_due(self.step, config.checkpoint_every):
                    self.save()
                if stopped:
                    break
        if until is None:
            bar.close()
        return TrainResult(
            self.step,
            self.validation_loss,
            self.seconds,
            stop.signal_number if self.step < config.steps else None,
            self.last_checkpoint,
        )

    def close(self) -> None:
        """Close the metrics file."""
        if self.metrics is not None:
            self.metrics.close()

    def _train_step(self, bar: "tqdm[Any]") -> None:
        config, process, watch = self.config, self.process, self._watch
        start = time.perf_counter()
        lr = self.learning_rate.apply(self.step)
        batch = self.train_sampler.next_batch(process.rank, process.world_size)
        share = batch.shape[0]
        pieces = torch.split(batch, min(config.micro_batch_size or share, share))
        loss = torch.zeros((), device=process.device)
        self.optimizer.zero_grad()
        for index, piece in enumerate(pieces):
            with gradient_sync(self.model, enabled=index == len(pieces) - 1):
                with watch.measure("forward"):
                    piece_loss = self._loss(piece) * (piece.shape[0] / share)
                with watch.measure("backward"):
                    torch.autograd.backward(piece_loss)
            loss += piece_loss.detach()
        grad_norm = self._clip()
        with watch.measure("optimizer"):
            self.optimizer.step()
        self.step += 1
        self._unlogged_steps += 1
        if not self._is_logged():
            self.seconds += time.perf_counter() - start
            return
        value = process.mean(loss).item()  # waits for the device
        times = watch.read(self._unlogged_steps)
        self._unlogged_steps = 0
        self.seconds += time.perf_counter() - start
        bar.set_postfix(loss=f"{value:.4f}", lr=f"{lr:.2e}", refresh=False)
        self._write(
            "train",
            loss=value,
            lr=lr,
            grad_norm=None if grad_norm is None else grad_norm.item(),
            **times,
            peak_memory_mib=peak_memory_mib(process.device),
        )
        if not math.isfinite(value):
            raise DivergedError(
                f"The loss of step {self.step} is {value}. The last checkpoint is "
                f"{self.last_checkpoint}; try a smaller optimizer.lr."
            )

    def _is_logged(self) -> bool:
        """Whether this step ends with a record, for which the host waits for the device."""
        return _is_due(self.step, self.config.log_every) or self.step == self.config.steps

    def _clip(self) -> Tensor | None:
        if self.config.clip_grad_norm is None:
            return None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of the next token, in nats."""
        if int(batch.max()) >= self.data.vocab_size:
            raise SettingsError(
                f"The data holds token {int(batch.max())}, outside of its vocabulary of "
                f"{self.data.vocab_size}."
            )
        batch = batch.to(self.process.device)
        use_bf16 = self.config.precision == Precision.bf16
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=use_bf16):
            logits = self.model(batch[:, :-1])
            return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def _validate(self, bar: "tqdm[Any]") -> None:
        self.model.eval()
        self._averaging_mode("eval")
        process = self.process
        total, rows = torch.zeros((), dtype=torch.float64, device=process.device), 0
        for batch in self.validation_sampler.fixed_batches(
            self.config.validation_batches, process.rank, process.world_size
        ):
            total += self._loss(batch) * batch.shape[0]
            rows += batch.shape[0]
        self.validation_loss = process.mean(total / rows).item()
        self._averaging_mode("train")
        self.model.train()
        perplexity = math.exp(min(self.validation_loss, 700.0))
        self._write("validation", loss=self.validation_loss, perplexity=perplexity)
        if self.process.is_first and self.config.progress:
            bar.write(f"step {self.step}: validation loss {self.validation_loss:.4f}")

    def _write(self, event: str, **values: Any) -> None:
        if self.metrics is not None:
            tokens = self.step * self.config.batch_size * self.config.sequence_length
            self.metrics.write(event, step=self.step, **values, seconds=self.seconds, tokens=tokens)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
