"""The training loop."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import dash_shampoo
from experiments import checkpoint, resuming
from experiments.builders import (
    build_data,
    build_learning_rate,
    build_model,
    build_optimizer,
    optimizer_family,
    parameter_groups,
)
from experiments.composition import plain
from experiments.environment import environment, peak_flops
from experiments.evaluation import Evaluator, block_records, failures
from experiments.metrics import Stopwatch, peak_memory_mib
from experiments.model import count_parameters, flops_per_token
from experiments.parallel import Process, gradient_sync, parallelise
from experiments.sampler import BatchSampler
from experiments.settings import Precision, SettingsError
from experiments.signals import StopRequest
from experiments.sinks import RunLog, open_sinks
from experiments.startup import averaged_model, check_disk, check_vocabulary, unwrapped
from experiments.tokens import TokenData, TokenSequence


class RunError(Exception):
    """A run that can't go on: a loss or a root is not finite, or a checkpoint can't be written."""


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
        config: The composed settings of ``train``.
        process: This process.
        output_dir: Where metrics and checkpoints go; the same on all processes.
        label: Name of the run in reports.
        data: Tokens, where the caller has them already; otherwise the group ``data`` is loaded.

    Raises:
        SettingsError: If settings contradict each other, the data or the checkpoint, or nothing
            can be written to `output_dir`.
    """

    def __init__(
        self,
        config: DictConfig,
        process: Process,
        output_dir: Path,
        label: str,
        data: TokenData | None = None,
    ) -> None:
        if config.batch_size % process.world_size:
            raise SettingsError(
                f"batch_size={config.batch_size} must be a multiple of the number of "
                f"processes, {process.world_size}."
            )
        self.config = config
        self.process = process
        self.output_dir = output_dir
        self.label = label
        self.checkpoints = output_dir / "checkpoints"
        self.data = data if data is not None else build_data(config)
        check_vocabulary(self.data, process)
        self.evaluator = Evaluator(config, process, self.data)
        self.train_sampler = self._sampler(self.data.train)

        model = self._build_model()
        self.num_parameters = count_parameters(model)
        self.model, distributed_config = parallelise(model, config.parallelism, process)
        groups = parameter_groups(model, config.parameter_groups)
        self.optimizer = build_optimizer(config.optimizer, groups, distributed_config)
        self.configured = checkpoint.plain_groups(self.optimizer)
        self.learning_rate = build_learning_rate(config.schedule, self.optimizer, config.steps)
        self.averaged = averaged_model(config, self.model)
        self._optimizer_mode("train")
        self._peak = peak_flops(config, process)
        self._flops_per_token = flops_per_token(model, config.sequence_length)
        if isinstance(self.optimizer, dash_shampoo.DashShampoo):
            self.optimizer.collects_diagnostics = config.diagnose_every > 0
        if config.compile:
            model.compile()
        self.step = 0
        self._unlogged_steps = 0
        self._watch = Stopwatch(process.device)
        self.seconds = 0.0
        self.validation_loss = math.nan
        self.changed_settings: dict[str, list[Any]] = {}
        if process.is_first:
            check_disk(output_dir, self.model, self.optimizer)
        self.last_checkpoint = self._resume()
        self._logged_seconds = self.seconds
        self.log = self._open_log() if process.is_first else None

    def _build_model(self) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(config.model, self.data.vocab_size, config.sequence_length)
        dtype = torch.float64 if config.precision == Precision.fp64 else torch.float32
        return model.to(device=self.process.device, dtype=dtype)

    def _sampler(self, tokens: TokenSequence) -> BatchSampler:
        config = self.config
        seed = config.seed if config.data_seed is None else config.data_seed
        try:
            return BatchSampler(tokens, config.sequence_length, config.batch_size, seed)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def _optimizer_mode(self, mode: str) -> None:
        """Optimizers that average iterates keep other weights for evaluation than for training."""
        if switch := getattr(self.optimizer, mode, None):
            switch()

    # Checkpoints

    def _resume(self) -> Path | None:
        for path in resuming.candidates(self.config, self.checkpoints, self.process):
            state = resuming.restore(
                path,
                self.config,
                self.process,
                self.model,
                self.optimizer,
                self.train_sampler,
                self.configured,
            )
            if state is not None:
                torch.set_rng_state(state["rng"])
                self.step, self.seconds = state["step"], state["seconds"]
                self.validation_loss = state["validation_loss"]
                self.changed_settings = resuming.changed_settings(
                    state["config"], plain(self.config)
                )
                if self.averaged is not None:
                    self.averaged.load_state_dict(state["averaged"])
                return path
        return None

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Returns:
            Its folder.

        Raises:
            RunError: If it can't be written.
        """
        try:
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
                    "averaged": None if self.averaged is None else self.averaged.state_dict(),
                    "optimizer_family": optimizer_family(self.optimizer),
                    "configured": self.configured,
                    "config": plain(self.config),
                },
            )
        except checkpoint.SaveError as error:
            raise RunError(f"{error} The last one is {self.last_checkpoint}.") from error
        config = self.config
        checkpoint.prune(self.checkpoints, config.keep_checkpoints, config.keep_every)
        return self.last_checkpoint

    def _open_log(self) -> RunLog:
        config = plain(self.config)
        start = {
            "label": self.label,
            **environment(self.process.device, self.process.world_size),
            "data": self.data.name,
            "data_digest": self.data.digest,
            "parameters": self.num_parameters,
            "config": config,
        }
        source = self.last_checkpoint
        resume = {"step": self.step, "checkpoint": str(source), "changed": self.changed_settings}
        sinks = open_sinks(self.config.sinks, self.output_dir, config)
        return RunLog(self.output_dir, start, None if source is None else resume, sinks)

    # The loop

    @property
    def _tokens_per_step(self) -> int:
        return int(self.config.batch_size * self.config.sequence_length)

    @property
    def last_step(self) -> int:
        """The step after which this run ends: that of the schedule, or an earlier stop."""
        config = self.config
        return int(
            config.steps if config.stop_after is None else min(config.stop_after, config.steps)
        )

    def run(self, until: int | None = None, bar: "tqdm[Any] | None" = None) -> TrainResult:
        """Train up to the last step, or until a signal asks to stop.

        Args:
            until: Return after this step already; a later call goes on.
            bar: A progress bar of the caller's, instead of one of this run.

        Returns:
            How it ended.

        Raises:
            RunError: If the loss is not finite, or a checkpoint can't be written.
        """
        config = self.config
        end = self.last_step
        last = end if until is None else min(until, end)
        hidden = not (config.progress and self.process.is_first)
        bar = bar or tqdm(total=end, initial=self.step, disable=hidden or None, dynamic_ncols=True)
        with StopRequest() as stop:
            if self.step == 0:
                self._validate(bar)
            while self.step < last:
                self._train_step(bar)
                bar.update()
                if _is_due(self.step, config.diagnose_every):
                    self._diagnose()
                done = self.step == end
                if done or _is_due(self.step, config.evaluate_every):
                    self._validate(bar)
                stopped = self._is_logged() and self.process.any(stop.signal_number is not None)
                if done or stopped or self._is_checkpoint_due():
                    self.save()
                if stopped:
                    break
        if until is None:
            bar.close()
        return TrainResult(
            self.step,
            self.validation_loss,
            self.seconds,
            stop.signal_number if self.step < end else None,
            self.last_checkpoint,
        )

    def close(self) -> None:
        """Close the metrics file and the sinks."""
        if self.log is not None:
            self.log.close()

    def _train_step(self, bar: "tqdm[Any]") -> None:
        config, process, watch = self.config, self.process, self._watch
        start = time.perf_counter()
        lr = self.learning_rate.apply(self.step)
        with watch.measure("data"):
            batch = self.train_sampler.next_batch(process.rank, process.world_size)
        share = batch.shape[0]
        pieces = torch.split(batch, min(config.micro_batch_size or share, share))
        loss = torch.zeros((), dtype=torch.float64, device=process.device)
        self.optimizer.zero_grad()
        for index, piece in enumerate(pieces):
            with gradient_sync(self.model, enabled=index == len(pieces) - 1):
                with watch.measure("forward"):
                    piece_loss = self.evaluator.loss(self.model, piece)[0]
                    piece_loss *= piece.shape[0] / share
                with watch.measure("backward"):
                    torch.autograd.backward(piece_loss)
            loss += piece_loss.detach()
        with watch.measure("clip"):
            grad_norm = self._clip()
        with watch.measure("optimizer"):
            try:
                self.optimizer.step()
            except ValueError as error:  # of inverse roots: one that is not finite, or too many bad
                raise RunError(f"Step {self.step + 1}: {error}") from error
        if self.averaged is not None and self.step >= config.average_from * config.steps:
            self.averaged.update_parameters(unwrapped(self.model))
        self.step += 1
        self._unlogged_steps += 1
        if not self._is_logged():
            self.seconds += time.perf_counter() - start
            return
        value = process.mean(loss).item()  # waits for the device
        times = watch.read(self._unlogged_steps)
        self.seconds += time.perf_counter() - start
        rate = self._unlogged_steps * self._tokens_per_step / (self.seconds - self._logged_seconds)
        self._unlogged_steps, self._logged_seconds = 0, self.seconds
        bar.set_postfix(loss=f"{value:.4f}", lr=f"{lr:.2e}", refresh=False)
        self._write(
            "train",
            loss=value,
            lr=lr,
            grad_norm=None if grad_norm is None else grad_norm.item(),
            **times,
            tokens_per_second=rate,
            mfu=None if self._peak is None else rate * self._flops_per_token / self._peak,
            peak_memory_mib=process.largest(peak_memory_mib(process.device)),
        )
        if not math.isfinite(value):
            raise RunError(
                f"The loss of step {self.step} is {value}. The last checkpoint is "
                f"{self.last_checkpoint}; try a smaller optimizer.lr."
            )

    def _is_logged(self) -> bool:
        """Whether this step ends with a record, for which the host waits for the device."""
        return _is_due(self.step, self.config.log_every) or self.step == self.last_step

    def _is_checkpoint_due(self) -> bool:
        config = self.config
        return _is_due(self.step, config.checkpoint_every) or _is_due(self.step, config.keep_every)

    def _clip(self) -> Tensor | None:
        if self.config.clip_grad_norm is None:
            return None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def _validate(self, bar: "tqdm[Any]") -> None:
        self._optimizer_mode("eval")
        results = self.evaluator.validate(self.model)
        for sample in self.evaluator.samples(self.model):
            self._write("sample", **sample)
        self._optimizer_mode("train")
        if self.averaged is not None and int(self.averaged.n_averaged) > 0:
            averaged = self.evaluator.validate(self.averaged)
            results |= {f"averaged_{name}": value for name, value in averaged.items()}
        self.validation_loss = results["loss"]
        self._write("validation", **results, **failures(self.optimizer))
        if self.process.is_first and self.config.progress:
            bar.write(f"step {self.step}: validation loss {self.validation_loss:.4f}")

    def _diagnose(self) -> None:
        if isinstance(self.optimizer, dash_shampoo.DashShampoo):
            self._write("diagnostics", **block_records(self.optimizer, self.process))

    def _write(self, event: str, **values: Any) -> None:
        if self.log is not None:
            values |= {"seconds": self.seconds, "tokens": self.step * self._tokens_per_step}
            self.log.write(event, self.step, values)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
