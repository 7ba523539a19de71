"""Small trainings that any machine can run in seconds, for studies that need hundreds of them."""

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """A byte-level Llama on the standard library's sources.

    Args:
        steps: How many.
        width: Of the model; heads are a quarter of it.
        sequence_length: In bytes.
        num_layers: Of the model.
        batch_size: In sequences.
    """

    def __init__(
        self,
        steps: int = 300,
        width: int = 64,
        sequence_length: int = 64,
        num_layers: int = 2,
        batch_size: int = 16,
    ) -> None:
        self.steps, self.width, self.sequence_length = steps, width, sequence_length
        self.num_layers, self.batch_size = num_layers, batch_size

    @cached_property
    def data(self) -> TokenData:
        """The tokens, read at the first use."""
        return load_text()

    def model(self) -> nn.Module:
        """See `Task`."""
        return Llama(
            vocab_size=256,
            num_layers=self.num_layers,
            width=self.width,
            num_heads=4,
            max_sequence_length=self.sequence_length,
        )

    def batches(self, seed: int) -> Iterator[Tensor]:
        """See `Task`."""
        sampler = BatchSampler(self.data.train, self.sequence_length, self.batch_size, seed)
        while True:
            yield sampler.next_batch()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See `Task`."""
        return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_loss(self, model: nn.Module) -> float:
        """See `Task`."""
        sampler = BatchSampler(self.data.validation, self.sequence_length, 64, seed=0)
        with torch.no_grad():
            pieces = sampler.batches(sampler.fixed_windows(4), 64)
            return statistics.fmean(float(self.loss(model, piece)) for piece in pieces)


class ClassificationTask(ABC):
    """Images or signals to be told apart, 300 steps of 64."""

    steps = 300

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and labels to train on, inputs and labels to validate on, read at the first use."""
        return self.load()

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read or make the data."""

    @abstractmethod
    def model(self) -> nn.Module:
        """See `Task`."""

    def batches(self, seed: int) -> Iterator[Tensor]:
        """See `Task`; a batch holds places in the data."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(len(self.data[1]), (64,), generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """See `Task`."""
        inputs, labels, *_ = self.data
        return functional.cross_entropy(model(inputs[batch]), labels[batch])

    def validation_loss(self, model: nn.Module) -> float:
        """See `Task`."""
        *_, inputs, labels = self.data
        with torch.no_grad():
            return float(functional.cross_entropy(model(inputs), labels))


class DigitsTask(ClassificationTask):
    """A 64-128-128-10 MLP on scikit-learn's digits."""

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """1,300 of the images to train on, 497 to validate on."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16.0
        labels = torch.tensor(digits.target)[order]
        return images[:1300], labels[:1300], images[1300:], labels[1300:]

    def model(self) -> nn.Module:
        """See `Task`."""
        hidden = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        return _with_head([*hidden], nn.Linear(128, 10))


class DigitsConvTask(DigitsTask):
    """A convnet of three 3×3 convolutions (16, 32, 64 channels) on scikit-learn's digits.

    Args:
        as_matrices: Keep every kernel as a matrix (out, in·3·3), so that the optimizer sees those.
    """

    def __init__(self, as_matrices: bool = False) -> None:
        self.as_matrices = as_matrices

    def model(self) -> nn.Module:
        """See `Task`."""
        layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
        for i, o in ((1, 16), (16, 32), (32, 64)):
            kernel = nn.Conv2d(i, o, 3, padding=1)
            layers += [_AsMatrix(kernel) if self.as_matrices else kernel, nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if o > 16 else []
        return _with_head([*layers, nn.Flatten()], nn.Linear(256, 10))


class Mnist1dTask(ClassificationTask):
    """A convnet of three convolutions (32, 64, 64 channels) on MNIST-1D.

    Args:
        as_matrices: As of `DigitsConvTask`.
    """

    def __init__(self, as_matrices: bool = False) -> None:
        self.as_matrices = as_matrices

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """4,000 signals of 40 to train on, 1,000 to validate on, made by the package mnist1d."""
        from mnist1d.data import get_dataset_args, make_dataset

        made = make_dataset(get_dataset_args())
        return (
            torch.tensor(made["x"], dtype=torch.float32)[:, None],
            torch.tensor(made["y"], dtype=torch.int64),
            torch.tensor(made["x_test"], dtype=torch.float32)[:, None],
            torch.tensor(made["y_test"], dtype=torch.int64),
        )

    def model(self) -> nn.Module:
        """See `Task`."""
        layers: list[nn.Module] = []
        for i, o, size in ((1, 32, 5), (32, 64, 3), (64, 64, 3)):
            kernel = nn.Conv1d(i, o, size, stride=2, padding=size // 2)
            layers += [_AsMatrix(kernel) if self.as_matrices else kernel, nn.ReLU()]
        return _with_head([*layers, nn.Flatten()], nn.Linear(320, 10))


def _with_head(layers: list[nn.Module], head: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    model.add_module("head", head)
    return model


class _AsMatrix(nn.Module):
    """A convolution whose kernel is kept as a matrix."""

    def __init__(self, kernel: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.kernel = [kernel]  # not a submodule: its parameters are not ours
        self.weight = nn.Parameter(kernel.weight.detach().flatten(1))
        self.bias = kernel.bias

    def forward(self, x: Tensor) -> Tensor:
        (kernel,) = self.kernel
        convolve = functional.conv1d if isinstance(kernel, nn.Conv1d) else functional.conv2d
        weight = self.weight.view(kernel.weight.shape)
        return convolve(x, weight, self.bias, kernel.stride, kernel.padding)


@dataclass(frozen=True)
class Fit:
    """How a training went.

    Attributes:
        steps: Steps of the validations.
        losses: Validation losses at these steps; infinity from where it diverged.
        seconds: Processor time of the training alone until each of them.
        optimizer_seconds: That of the optimizer's steps, of all together.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    optimizer_seconds: float

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.losses[-1]


def fit(
    task: Task,
    make_optimizer: Callable[[nn.Module], Optimizer],
    seed: int,
    after_backward: Callable[[nn.Module, int], None] | None = None,
    validations: int = 1,
) -> Fit:
    """Train a task's model with a warm-up, a cosine and clipped gradients.

    Args:
        task: What is trained.
        make_optimizer: From the model; its groups' lr are the peaks.
        seed: Of the weights and the batches.
        after_backward: Called with the model and the step while the gradients are there.
        validations: How many, evenly spaced, the last at the end.

    Returns:
        The validation losses and the time that it took.
    """
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(model)
    schedule = LearningRate(optimizer, task.steps, SCHEDULE)
    marks = [task.steps * (i + 1) // validations for i in range(validations)]
    losses: list[float] = []
    seconds: list[float] = []
    total = in_optimizer = 0.0
    for step, batch in zip(range(task.steps), task.batches(seed), strict=False):
        started = time.process_time()
        schedule.apply(step)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        if not math.isfinite(loss.item()):
            break
        torch.autograd.backward(loss)
        if after_backward is not None:
            after_backward(model, step)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepped = time.process_time()
        optimizer.step()
        ended = time.process_time()
        total, in_optimizer = total + ended - started, in_optimizer + ended - stepped
        if step + 1 in marks:
            value = task.validation_loss(model)
            losses.append(value if math.isfinite(value) else math.inf)
            seconds.append(total)
    missing = len(marks) - len(losses)
    return Fit(
        tuple(marks),
        (*losses, *[math.inf] * missing),
        (*seconds, *[total] * missing),
        in_optimizer,
    )
