"""The fused square: its numbers by Triton's interpreter, its predicate and its operator."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from benchmarks.device_counts import DeviceCounts
from dash_shampoo.products import Products, count_products
from dash_shampoo.products.fused import FUSED_PRECISIONS, can_use_fused
from dash_shampoo.products.product import fused_square_
from dash_shampoo.products.tiles import Tiles, find_tiles, tile_table
from tests.products.fused_cases import KINDS, make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", FUSED_PRECISIONS)
def test_the_kernel_is_as_accurate_as_the_reference(interpreted, precision, kind):
    cases = {
        key: case
        for key, case in interpreted["square"].items()
        if key.startswith(f"{precision} {kind}")
    }
    assert len(cases) == 5
    for key, case in cases.items():
        # The order of the sums differs: some roundings of float32 beside those of the operands.
        assert case["error"] <= 1.05 * case["reference"] + 2e-7, (key, case)
        assert case["is_symmetric"], key
        assert case["norms"] <= 3 * case["reference"] + 1e-6, key


def test_the_error_is_that_of_the_precision(interpreted):
    bounds = {"fp32": 5e-7, "fp16x3": 5e-7, "tf32": 5e-4, "fp16": 5e-4, "bf16": 4e-3}
    for key, case in interpreted["square"].items():
        assert case["error"] <= bounds[key.split()[0]], (key, case)
        if "bf16" in key:
            assert case["error"] > 1e-6, "bf16 rounds"


def test_the_predicate():
    S = torch.eye(8).expand(2, 8, 8).contiguous()
    assert not can_use_fused(S, "fp16"), "it is on the CPU"


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need triton")
def test_a_row_of_the_table_can_leave_a_size_to_torch(monkeypatch):
    rows = [Tiles(64, 0, 0, 0, 0), Tiles(0, 64, 16, 4, 3)]
    monkeypatch.setitem(tile_table("square")["sm_90"], "fp32", rows)
    find_tiles.cache_clear()
    small, large = torch.eye(64)[None].clone(), torch.eye(65)[None].clone()
    with DeviceCounts({}, default="outside") as device:
        device.place([small, large])
        assert (can_use_fused(small, "fp32"), can_use_fused(large, "fp32")) == (False, True)
        assert can_use_fused(small, "fp16")
    find_tiles.cache_clear()


def test_tiles_of_a_device_that_is_not_in_the_table():
    assert find_tiles("square", (8, 9), "tf32", 1024) == find_tiles("square", (8, 0), "tf32", 1024)
    assert find_tiles("square", (10, 3), "fp16", 64) == find_tiles("square", (10, 0), "fp16", 64)
    assert find_tiles("square", (12, 0), "fp16", 64) == find_tiles("square", (8, 0), "fp16", 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", FUSED_PRECISIONS)
def test_the_operator_on_the_cpu_is_the_reference(precision, kind):
    arguments = make(kind, 24)
    out, expected = torch.empty_like(arguments.S), torch.empty_like(arguments.S)
    fused_square_(out, *arguments.operands(precision))
    beta = arguments.beta if arguments.weights is None else arguments.weights
    Products(precision).square(
        arguments.S, out=expected, alpha=arguments.alpha, addend=arguments.addends, beta=beta,
        shift=arguments.shift, scale=arguments.scale, factors=arguments.factors,
        offsets=arguments.offsets,
    )  # fmt: skip
    assert torch.equal(out, expected)


def test_the_operator_counts_as_one_symmetric_product():
    arguments = make("plain", 24)
    with count_products(num_blocks=arguments.S.shape[0], size=24) as count:
        fused_square_(torch.empty_like(arguments.S), *arguments.operands("fp16x3"))
    assert (count.num_products, count.num_symmetric) == (1.0, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", FUSED_PRECISIONS)
@pytest.mark.parametrize("size", [17, 64, 131, 300, 1000])
def test_on_a_device(precision, kind, size):
    arguments = make(kind, size)
    operands = [
        x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments.operands(precision)
    ]
    out = torch.empty_like(operands[0])
    fused_square_(out, *operands)
    truth = arguments.truth()
    reference = torch.empty_like(arguments.S)
    fused_square_(reference, *arguments.operands(precision))
    error, tolerated = ((x.cpu() - truth).norm() / truth.norm() for x in (out, reference))
    assert error <= 1.05 * tolerated + 2e-6
    assert torch.equal(out, out.mT)
