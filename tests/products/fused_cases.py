"""Operands of the kernels, and the truth in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import pack, unpack
from dash_shampoo.preconditioners.modes import unfold

NUM_BLOCKS = 3


@dataclass(frozen=True)
class Arguments:
    S: Tensor
    addends: Tensor | None
    weights: Tensor | None
    scale: Tensor | None
    alpha: float
    beta: float
    shift: float
    factors: Tensor | None = None
    offsets: Tensor | None = None

    def operands(self, precision: str) -> tuple[Any, ...]:
        """What follows `out` in a call."""
        return (
            self.S, self.addends, self.weights, self.scale, precision, self.alpha, self.beta, self.shift,
            self.factors, self.offsets,
        )  # fmt: skip

    def truth(self) -> Tensor:
        """In float64."""
        S = self.S.double()
        if self.factors is not None:
            S = self.factors.double()[:, None, None] * S
            S = S + self.offsets.double()[:, None, None] * torch.eye(
                S.shape[-1], dtype=torch.float64
            )
        result = self.alpha * S @ S + self.shift * torch.eye(S.shape[-1], dtype=torch.float64)
        if self.addends is not None:
            addends = self.addends.double().reshape(-1, *S.shape)
            weights = torch.tensor([self.beta]) if self.weights is None else self.weights
            result = result + (weights.double()[:, None, None, None] * addends).sum(0)
        return result if self.scale is None else result * self.scale.double()[:, None, None]


def symmetric(size: int, seed: int) -> Tensor:
    """A stack about 1.5·I whose eigenvalues are between 0 and 3."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NUM_BLOCKS, size, size, generator=generator) / size**0.5
    return (noise + noise.mT) / 2 + 1.5 * torch.eye(size)


def make(kind: str, size: int) -> Arguments:
    """Arguments of one kind of call."""
    S = symmetric(size, 0)
    match kind:
        case "plain":
            return Arguments(S, None, None, None, 1.0, 1.0, 0.0)
        case "first":
            # Beyond the range of fp16, and brought back into it.
            factors = torch.tensor([1e-6, 0.5e-6, 2e-6])
            return Arguments(1e6 * S, None, None, None, 1.0, 1.0, 0.0, factors, 3e5 * factors)
        case "rung":
            return Arguments(S, symmetric(size, 1), None, None, -0.7, 1.3, 0.25)
        case "last":
            # Rows apart from each other, as a solver's workspace has them.
            addends = torch.zeros(4, S.numel() + 16)[:, : S.numel()]
            for number in range(4):
                addends[number] = symmetric(size, number).flatten()
            weights = torch.tensor([0.5, -0.25, 1.0, 2.0])
            return Arguments(S, addends, weights, torch.tensor([2.0, 0.5, 3.0]), 0.7, 1.0, 0.1)
        case _:
            raise ValueError(kind)


KINDS = ("plain", "first", "rung", "last")


# --------------------------------------------------------------------------- F ← βF + w·GGᵀ

DECAY, WEIGHT = 0.9, 0.1
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Update:
    """Factor matrices and the unfolding of gradients that enters them.

    Attributes:
        stack (Tensor): (B, N, N) or packed (B, P); of which `rows` are updated.
        rows (slice): See there.
        unfolded (Tensor): As of `accumulate_outer_`.
    """

    stack: Tensor
    rows: slice
    unfolded: Tensor

    @property
    def old(self) -> Tensor:
        """(K, N, N) the matrices before."""
        return self.matrices(self.stack)

    def matrices(self, stack: Tensor) -> Tensor:
        """(K, N, N) the updated rows of a stack."""
        return unpack(stack[self.rows]) if stack.ndim == 2 else stack[self.rows]

    def truth(self) -> Tensor:
        """(K, N, N) in float64."""
        U = self.unfolded.double().flatten(2)
        return DECAY * self.old.double() + WEIGHT * U @ U.mT


UPDATES = ("rows", "columns", "middle", "vectors", "one")


def make_update(kind: str, size: int, dtype: torch.dtype, is_packed: bool) -> Update:
    """A slice of a stack, and gradients of blocks of some shape in one of their dimensions."""
    generator = torch.Generator().manual_seed(size)
    count = 1 if kind == "one" else NUM_BLOCKS
    shape, dimension = {
        "rows": ((size, 53), 0),
        "columns": ((21, size), 1),
        "middle": ((3, size, 5), 1),
        "vectors": ((size,), 0),
        "one": ((size, 40), 0),
    }[kind]
    blocks = torch.randn(count, *shape, generator=generator).to(dtype)
    stack = symmetric(size, 3)[:1].repeat(count + 2, 1, 1)
    if is_packed:
        stack = pack(stack)
    return Update(stack, slice(1, 1 + count), unfold(blocks, dimension))


# ------------------------------------------------------------------------------------ XᵀGY

SIDES = ((7, 5), (33, 20), (70, 40), (12, 100))


def make_sides(
    rows: int, columns: int, dtype: torch.dtype, count: int = NUM_BLOCKS
) -> list[Tensor]:
    """Blocks that are rows of larger ones, a matrix for the left side, and a transposed one for the right."""
    generator = torch.Generator().manual_seed(rows)
    G = torch.randn(count, rows + 3, columns, generator=generator)[:, :rows]
    X = torch.randn(count, rows, rows, generator=generator) / rows**0.5
    Y = torch.randn(count, columns, columns, generator=generator).mT / columns**0.5
    return [G, X.to(dtype), Y.to(dtype)]
