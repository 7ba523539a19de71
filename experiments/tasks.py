"""Small trainings that any machine can run in seconds, for studies that need hundreds of them."""

import math
import statistics
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from experiments.corpus import load_text
from experiments.model import Llama
from experiments.sampler import BatchSampler
from experiments.schedule import Factor, LearningRate, one_cycle
from experiments.tokens import TokenData

SCHEDULE: Factor = partial(one_cycle, warmup_fraction=0.1, start_factor=0.01, end_factor=0.1)


class Task(Protocol):
    """A model and data."""

    steps: int

    def model(self) -> nn.Module:
        """A model with fresh weights, from torch's global generator."""

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Batches without end."""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean loss of a batch."""

    def validation_loss(self, model: nn.Module) -> float:
        """Mean loss over held-out data."""


class LlamaTask:
    """A two-layer byte-level Llama on the standard library's sources, 300 steps of 16 × 64 bytes."""

    def __init__(self, steps: int = 300, width: int = 64, sequence_length: int = 64) -> None:
        self.steps, self.width, self.sequence_length = steps, width, sequence_length

    @cached_property
    def data(self) -> TokenData:
        """The tokens, read at the first use."""
        return load_text()

    def model(self) -> nn.Module:
        """See `Task`."""
        return Llama(
            vocab_size=256,
            num_layers=2,
            width=self.width,
            num_heads=4,
            max_sequence_length=self.sequence_length,
        )

    def batches(self, seed: int) -> Iterator[Tensor]:
        """See `Task`."""
        sampler = BatchSampler(self.data.train, self.sequence_length, 16, seed)
        while True:
            yield sampler.next_batch()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See `Task`."""
        return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_loss(self, model: nn.Module) -> float:
        """See `Task`."""
        sampler = BatchSampler(self.data.validation, self.sequence_length, 64, seed=0)
        with torch.no_grad():
            pieces = sampler.batches(sampler.fixed_windows(16), 64)
            return statistics.fmean(float(self.loss(model, piece)) for piece in pieces)


class DigitsTask:
    """A 64-128-128-10 MLP on scikit-learn's digits, 300 steps of 64 images."""

    steps = 300

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16.0
        labels = torch.tensor(digits.target)[order]
        self.train, self.validation = (images[:1300], labels[:1300]), (images[1300:], labels[1300:])

    def model(self) -> nn.Module:
        """See `Task`."""
        return nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def batches(self, seed: int) -> Iterator[Tensor]:
        """See `Task`."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(len(self.train[0]), (64,), generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See `Task`."""
        return functional.cross_entropy(model(self.train[0][batch]), self.train[1][batch])

    def validation_loss(self, model: nn.Module) -> float:
        """See `Task`."""
        with torch.no_grad():
            return float(functional.cross_entropy(model(self.validation[0]), self.validation[1]))


def fit(
    task: Task,
    make_optimizer: Callable[[nn.Module], Optimizer],
    seed: int,
    after_backward: Callable[[nn.Module, int], None] | None = None,
) -> float:
    """Train a task's model with a warm-up, a cosine and clipped gradients.

    Args:
        task: What is trained.
        make_optimizer: From the model; its groups' lr are the peaks.
        seed: Of the weights and the batches.
        after_backward: Called with the model and the step while the gradients are there.

    Returns:
        The validation loss, or infinity if the training diverged.
    """
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(model)
    schedule = LearningRate(optimizer, task.steps, SCHEDULE)
    for step, batch in zip(range(task.steps), task.batches(seed), strict=False):
        schedule.apply(step)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        if not math.isfinite(loss.item()):
            return math.inf
        torch.autograd.backward(loss)
        if after_backward is not None:
            after_backward(model, step)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    value = task.validation_loss(model)
    return value if math.isfinite(value) else math.inf
