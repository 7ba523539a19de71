"""Parameters and gradients of the benchmarks: shapes of real models, the same values in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = list[tuple[tuple[int, ...], int]]


def llama(layers: int, width: int, vocabulary: int, hidden: int | None = None) -> Shapes:
    """Weight shapes of a Llama, each with how often it occurs."""
    hidden = hidden or 256 * -(-8 * width // (3 * 256))
    return [
        ((vocabulary, width), 2),
        ((width, width), 4 * layers),
        ((hidden, width), 2 * layers),
        ((width, hidden), layers),
        ((width,), 2 * layers + 1),
    ]


@dataclass(frozen=True)
class Case:
    """Parameters to step, and the block size they are cut to."""

    description: str
    shapes: Shapes
    block: int


CASES = {
    "256x64": Case("256 factors of 64 (128 weights of 64×64)", [((64, 64), 128)], 64),
    "64x256": Case("64 factors of 256 (32 weights of 256×256)", [((256, 256), 32)], 256),
    "8x1024": Case("8 factors of 1024 (4 weights of 1024×1024)", [((1024, 1024), 4)], 1024),
    "146-of-64": Case(
        "146 blocks of at most 64, a Llama of 2 layers and width 128", llama(2, 128, 512, 352), 64
    ),
    "458-of-128": Case(
        "458 blocks of 128, a Llama of 8 layers and width 256", llama(8, 256, 256), 128
    ),
    "10000-of-16": Case("10,000 weights of 16×16", [((16, 16), 10_000)], 16),
    "llama-30m": Case("Llama, 6 layers, width 640, block 256", llama(6, 640, 32000), 256),
    "llama-953m": Case("Llama, 16 layers, width 2048, block 1024", llama(16, 2048, 32000), 1024),
}


def make_parameters(case: Case, device: str) -> list[Tensor]:
    """The values of a case's parameters, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(device)
        for shape, count in case.shapes
        for _ in range(count)
    ]


def make_gradients(values: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gradients whose rows and columns decay over two decades, so that factors are ill-conditioned."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for value in values:
        gradient = torch.randn(value.shape, generator=generator)
        for dim, size in enumerate(value.shape):
            shape = [1] * value.ndim
            shape[dim] = size
            gradient *= torch.logspace(0, -2, size).reshape(shape)
        gradients.append(gradient.to(value.device))
    return gradients


def set_gradients(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Gives parameters copies of gradients."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
