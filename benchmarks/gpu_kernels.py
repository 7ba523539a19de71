"""Errors and times of our kernels against torch's products, for `gpu.py`."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_time
from dash_shampoo.base import pack, unpack
from dash_shampoo.products import (
    Products,
    accumulate_outer_,
    can_use_outer,
    can_use_two_sided,
    two_sided,
)
from dash_shampoo.products.fused import FUSED_PRECISIONS
from dash_shampoo.products.outer import OUTER_PRECISIONS
from dash_shampoo.products.precision import tf32_switch
from dash_shampoo.products.sides import SIDED_PRECISIONS

# About as many bytes in each stack.
ELEMENTS = 2**24
# Sums in another order, beside the error that the reference makes.
TOLERANCE = 2e-6
DECAY, WEIGHT = 0.95, 0.05
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The largest N of blocks that are multiplied on both sides: beyond it there is no kernel.
LARGEST_SIDE = 256
# While the device sleeps, so long that it then finds all launches in its queue: launching takes longer than
# a kernel on small matrices does.
_SLEEP_CYCLES = 10_000_000
_QUEUED = 10

Row = dict[str, Any]


def brief(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__} {error}".strip().split("\n", 1)[0].rstrip(".")


def release() -> None:
    """Gives memory back to the device that what failed may have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Clock:
    """Times calls on a device, and tells how much of the budget is left.

    Args:
        device: "cuda" or "cpu".
        seconds: The budget.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self._end = time.monotonic() + seconds

    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() >= self._end

    def milliseconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """The median time of a call with its launches, after one that is not timed."""
        kind = "cuda" if self.device == "cuda" else "wall clock"
        call()
        return statistics.median(step_time.milliseconds(call, 1, kind) for _ in range(repeats))

    def device_milliseconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """The median time that the device takes for a call, after one that is not timed."""
        if self.device != "cuda":
            return self.milliseconds(call, repeats)
        call()
        return statistics.median(queued_milliseconds(call) for _ in range(repeats))


def queued_milliseconds(call: Callable[[], object], number: int = _QUEUED) -> float:
    """The mean time of some calls on the CUDA device that finds them all in its queue."""
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(number):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / number


@lru_cache(maxsize=4)
def stack_of(num_blocks: int, size: int, device: str) -> Tensor:
    """Symmetric blocks with eigenvalues between 0 and 3, made once for all precisions; not to be changed."""
    generator = torch.Generator().manual_seed(size)
    noise = torch.randn(num_blocks, size, size, generator=generator) / size**0.5
    S: Tensor = (noise + noise.mT) / 2 + 1.5 * torch.eye(size)
    return S.to(device)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """In the Frobenius norm."""
    return float((value.double() - truth).norm() / truth.norm())


def row_of(
    kernel: str,
    size: int,
    num_blocks: int,
    precision: str,
    is_fused: bool,
    errors: tuple[float, float],
) -> Row:
    """What is known of a case before it is timed."""
    error, reference = errors
    return {
        "kernel": kernel,
        "N": size,
        "B": num_blocks,
        "precision": precision,
        "by": "kernel" if is_fused else "torch",
        "error": error,
        "reference": reference,
        "is_right": error <= 1.05 * reference + TOLERANCE,
    }  # fmt: skip


# ----------------------------------------------------------------------------------- squares


def errors_of_square(precision: Any, size: int, device: str) -> tuple[float, float]:
    """The relative errors of the square that serves, and of torch's products, against float64."""
    S, M = stack_of(2, size, device), stack_of(2, size + 1, device)[:, :size, :size].contiguous()
    products, truth = Products(precision), 0.5 * S.double() @ S.double() - 0.25 * M.double()
    ours = products.square(S, alpha=0.5, addend=M, beta=-0.25)
    reference = products._reference_square(
        S, torch.empty_like(S), 0.5, M, -0.25, shift=0.0, scale=None
    )
    return relative_error(ours, truth), relative_error(reference, truth)


def square_row(size: int, precision: Any, is_timed: bool, clock: Clock) -> Row:
    """S²/2 + M/2; "fp32" is torch's time of it in fp32, "bmm" that of its product alone."""
    S = stack_of(max(1, min(256, ELEMENTS // size**2)), size, clock.device)
    out, M, products = torch.empty_like(S), S.clone(), Products(precision)
    errors = errors_of_square(precision, size, clock.device)
    row = row_of("square", size, len(S), precision, products.can_fuse(S), errors)
    if is_timed:
        exact, operands = Products("fp32"), (S, out, 0.5, M, 0.5, 0.0, None)
        row["fp32"] = clock.device_milliseconds(partial(exact._reference_square, *operands))
        ours = partial(products.square, S, out=out, alpha=0.5, addend=M, beta=0.5)
        row["ours"] = clock.device_milliseconds(ours)
        row["torch"] = clock.device_milliseconds(partial(products._reference_square, *operands))
        rounded = products.round(S)
        row["bmm"] = clock.device_milliseconds(partial(products, rounded, rounded))
    return row


# ----------------------------------------------------------------------------------- updates


def torch_update(factors: Tensor, gradients: Tensor) -> None:
    """F ← βF + w·GGᵀ by torch's products."""
    U = gradients.float()
    if factors.ndim == 3:
        factors.baddbmm_(U, U.mT, beta=DECAY, alpha=WEIGHT)
        return
    factors.mul_(DECAY).add_(pack(torch.bmm(U, U.mT)), alpha=WEIGHT)


def our_update(factors: Tensor, gradients: Tensor) -> None:
    """The same, as it is done in a step."""
    if can_use_outer(factors, gradients):
        accumulate_outer_(factors, gradients, DECAY, WEIGHT)
    else:
        torch_update(factors, gradients)


def update_row(
    size: int, precision: str, is_timed: bool, clock: Clock, *, is_packed: bool = False
) -> Row:
    """A factor update by square blocks, for gradients of a dtype."""
    factors = stack_of(max(1, min(256, ELEMENTS // size**2)), size, clock.device)
    # No symmetric ones, which would not show a dimension for another.
    gradients = factors.triu().to(DTYPES.get(precision, torch.float32)).mT
    few = gradients[:2].double()
    truth = DECAY * factors[:2].double() + WEIGHT * (few @ few.mT)
    stored = pack(factors) if is_packed else factors.clone()
    with tf32_switch(precision == "tf32"):
        errors = []
        for update in (our_update, torch_update):
            result = stored[:2].clone()
            update(result, gradients[:2])
            errors.append(relative_error(unpack(result) if is_packed else result, truth))
        kind = "update, packed" if is_packed else "update"
        by_kernel = can_use_outer(stored, gradients)
        row = row_of(kind, size, len(factors), precision, by_kernel, (errors[0], errors[1]))
        if is_timed:
            row["ours"] = clock.device_milliseconds(partial(our_update, stored, gradients))
            row["torch"] = clock.device_milliseconds(partial(torch_update, stored, gradients))
    return row


# ------------------------------------------------------------------------------- both sides


def torch_sides(G: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """XᵀGY by torch's products."""
    return torch.bmm(torch.bmm(X.mT, G.to(X.dtype)), Y).to(G.dtype)


def our_sides(G: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """The same, as it is done in a step."""
    return two_sided(G, X, Y) if can_use_two_sided(G, X, Y) else torch_sides(G, X, Y)


def sides_row(size: int, precision: str, is_timed: bool, clock: Clock) -> Row:
    """Square blocks of fp32 between matrices of a dtype."""
    G = stack_of(max(1, min(256, ELEMENTS // size**2)), size, clock.device)
    X = G.to(DTYPES.get(precision, torch.float32))
    # Of the operands as they are: what is rounded of them is no error of the product.
    truth = X[:2].double().mT @ G[:2].double() @ X[:2].double()
    with tf32_switch(precision == "tf32"):
        few = (G[:2], X[:2], X[:2])
        errors = (
            relative_error(our_sides(*few), truth),
            relative_error(torch_sides(*few), truth),
        )
        row = row_of("sides", size, len(G), precision, can_use_two_sided(G, X, X), errors)
        if is_timed:
            row["ours"] = clock.device_milliseconds(partial(our_sides, G, X, X))
            row["torch"] = clock.device_milliseconds(partial(torch_sides, G, X, X))
    return row


# ------------------------------------------------------------------------------------- table

# Name, what measures a case, its precisions, and its largest N.
KERNELS: tuple[tuple[str, Callable[..., Row], tuple[str, ...], int], ...] = (
    ("square", square_row, FUSED_PRECISIONS, 2**20),
    ("update", update_row, OUTER_PRECISIONS, 2**20),
    ("update, packed", partial(update_row, is_packed=True), OUTER_PRECISIONS, 2**20),
    ("sides", sides_row, SIDED_PRECISIONS, LARGEST_SIDE),
)


def measured_kernels(timed: Sequence[int], ragged: Sequence[int], clock: Clock) -> Iterator[Row]:
    """The rows of all kernels until the time is spent; what fails is a row that is wrong."""
    for kernel, measure, precisions, largest in KERNELS:
        for size, precision in product((*timed, *ragged), precisions):
            if clock.is_over():
                return
            if size > largest:
                continue
            try:
                yield measure(size, precision, size in timed, clock)
            except Exception as error:
                row = row_of(kernel, size, 0, precision, True, (math.nan, math.nan))
                yield row | {"by": f"failed: {brief(error)}"}
                release()


def kernel_table(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    header = ["Kernel", "N", "B", "precision", "by", "error", "torch's error", "right", "ms"]
    header += ["÷ torch's of that precision", "torch's fp32 ÷ ours"]
    cells = []
    for row in rows:
        ours = row.get("ours")
        timed = ["–"] * 3
        if ours is not None:
            in_fp32 = f"{row['fp32'] / ours:.2f}" if "fp32" in row else "–"
            timed = [f"{ours:.3f}", f"{ours / row['torch']:.2f}", in_fp32]
        errors = [f"{row['error']:.1e}", f"{row['reference']:.1e}"]
        is_right = "yes" if row["is_right"] else "NO"
        names = [row["kernel"], str(row["N"]), str(row["B"]), row["precision"], row["by"]]
        cells.append([*names, *errors, is_right, *timed])
    return step_time.table(header, cells)
