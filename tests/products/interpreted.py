"""The kernels by Triton's interpreter, in a process of its own: Triton decides at its import.

Prints, for every precision, kind of call, size and tiles, the errors against float64 of the kernel and of the
reference by torch's products, and what must be exact.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from dash_shampoo.products import kernels
from dash_shampoo.products.fused import FUSED_PRECISIONS, launch_square, norm_parts
from dash_shampoo.products.outer import OUTER_PRECISIONS, launch_outer
from dash_shampoo.products.product import Products
from dash_shampoo.products.sides import SIDED_PRECISIONS, launch_two_sided
from dash_shampoo.products.tiles import Tiles
from tests.products.fused_cases import (
    DECAY,
    DTYPES,
    KINDS,
    SIDES,
    UPDATES,
    WEIGHT,
    Arguments,
    make,
    make_sides,
    make_update,
)

# One tile, several with a ragged last one, a multiple; odd numbers of columns.
CASES = [(7, 32, 32), (37, 32, 32), (64, 32, 32), (67, 64, 32), (130, 128, 32)]

_dot = interpreter.InterpreterBuilder.create_dot
_convert = interpreter._convert_float


def _dot_of_bf16(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """The interpreter holds bf16 as integers of 16 bits, and would multiply those."""
    if a.dtype == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            for x in (a, b)
        )
    return _dot(self, a, b, *others)


def _rounded_to_bf16(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """The interpreter cuts off what a device rounds."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(data).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return _convert(data, source, target, mode)


def errors_of(arguments: Arguments, precision: Any, tiles: Tiles) -> dict[str, Any]:
    """What one call gives."""
    truth = arguments.truth()
    # Written over one of the addends where there is one alone, as a solver does.
    in_place = arguments.addends is not None and arguments.weights is None
    out = arguments.addends.clone() if in_place else torch.full_like(arguments.S, torch.nan)
    operands = list(arguments.operands(precision))
    if in_place:
        operands[1] = out
    norms = norm_parts(out)
    launch_square(kernels.symmetric_square, tiles, out, *operands, norms)
    beta = arguments.beta if arguments.weights is None else arguments.weights
    reference = Products(precision).square(
        arguments.S, alpha=arguments.alpha, addend=arguments.addends, beta=beta,
        shift=arguments.shift, scale=arguments.scale, factors=arguments.factors,
        offsets=arguments.offsets,
    )  # fmt: skip
    return {
        "error": float((out - truth).norm() / truth.norm()),
        "reference": float((reference - truth).norm() / truth.norm()),
        "is_symmetric": torch.equal(out, out.mT),
        "norms": relative_error(norms.double().sum(-1), truth.square().sum((1, 2))),
    }


def relative_error(values: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((values - truth) / truth).abs().max())


def errors_of_update(kind: str, size: int, precision: Any, is_packed: bool, tiles: Tiles) -> Any:
    """What one update of factor matrices gives, beside that by torch's products."""
    update = make_update(kind, size, DTYPES[precision], is_packed)
    U = Products(precision).round(update.unfolded.float()).flatten(2)
    reference = torch.baddbmm(update.old, U, U.mT, beta=DECAY, alpha=WEIGHT)
    truth, before = update.truth(), update.stack.clone()
    launch_outer(
        kernels.accumulate_outer, tiles, update.stack[update.rows], update.unfolded, DECAY, WEIGHT,
        precision,
    )  # fmt: skip
    result = update.old
    others = torch.ones(len(before), dtype=torch.bool)
    others[update.rows] = False
    return {
        "error": float((result - truth).norm() / truth.norm()),
        "reference": float((reference - truth).norm() / truth.norm()),
        "is_symmetric": torch.equal(result, result.mT),
        "are_others_kept": torch.equal(update.stack[others], before[others]),
    }


def errors_of_sides(rows: int, columns: int, precision: Any, count: int, tiles: Tiles) -> Any:
    """What one product on both sides gives, beside that by torch's products."""
    G, X, Y = make_sides(rows, columns, DTYPES[precision], count)
    truth = X.double().mT @ G.double() @ Y.double()
    products = Products(precision)
    reference = products(products(X.float().mT, G), Y.float())
    out = torch.full(G.shape, torch.nan)
    launch_two_sided(kernels.two_sided, tiles, out, G, X, Y, precision)
    return {
        "error": float((out - truth).norm() / truth.norm()),
        "reference": float((reference - truth).norm() / truth.norm()),
    }


def main() -> None:
    interpreter.InterpreterBuilder.create_dot = _dot_of_bf16
    interpreter._convert_float = _rounded_to_bf16
    results: dict[str, Any] = {"square": {}, "outer": {}, "two_sided": {}}
    for precision, kind, case in itertools.product(FUSED_PRECISIONS, KINDS, CASES):
        size, tile, step = case
        errors = errors_of(make(kind, size), precision, Tiles(0, tile, step, 4, 1))
        results["square"][f"{precision} {kind} {size}"] = errors
    for precision, kind, is_packed in itertools.product(OUTER_PRECISIONS, UPDATES, (False, True)):
        for size in (7, 37, 70):
            errors = errors_of_update(kind, size, precision, is_packed, Tiles(0, 32, 16, 4, 1))
            key = f"{precision} {kind} {'packed' if is_packed else 'full'} {size}"
            results["outer"][key] = errors
    for precision, sides, count in itertools.product(SIDED_PRECISIONS, SIDES, (1, 3)):
        errors = errors_of_sides(*sides, precision, count, Tiles(0, 32, 16, 4, 1))
        results["two_sided"][f"{precision} {sides} {count}"] = errors
    print(json.dumps(results))


if __name__ == "__main__":
    main()
