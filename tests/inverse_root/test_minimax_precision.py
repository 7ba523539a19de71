"""`matmul_precision="auto"`: by tables and device, never by torch's switches."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec

import pytest
import torch

from benchmarks.device_counts import DeviceCounts
from dash_shampoo.inverse_root import MinimaxConfig, inverse_root
from dash_shampoo.inverse_root.minimax.rounding import precision_within, resolved
from dash_shampoo.inverse_root.minimax.solve import table_of
from tools.minimax.rounding import added_error, matrices


@pytest.mark.parametrize(
    ("damping", "squarings", "precision"),
    [
        (1e-2, None, "fp16"),
        (1e-3, None, "fp16x3"),
        (1e-3, 4, "fp16"),
        (1e-4, None, "fp16x3"),
        (1e-4, 5, "fp16"),
        (1e-5, 4, "fp16x3"),
        (1e-6, None, "fp16x3"),
    ],
)
def test_the_fastest_that_keeps_the_error(damping, squarings, precision):
    config = MinimaxConfig(relative_epsilon=damping, num_squarings=squarings)
    error = table_of(config, Fraction(2)).error
    assert precision_within(error, damping) == precision
    # The promise itself, on the matrices that the table comes from; at 1e-6, fp32 is as far from the truth.
    bound = 0.04 if damping == 1e-6 else 0.5 * error
    assert added_error(matrices(), precision, damping) <= bound


def test_a_damping_between_two_of_the_table_counts_as_the_smaller_one():
    assert precision_within(0.006, 5e-3) == precision_within(0.006, 1e-3)
    assert precision_within(0.5, 1e-8) == "fp16x3"


@pytest.mark.skipif(find_spec("triton") is None, reason="the fused square needs triton")
def test_on_an_accelerator_it_is_the_table_and_on_the_cpu_fp32():
    A = torch.eye(8).expand(2, 8, 8).contiguous()
    assert resolved("auto", A, 0.6, 1e-4) == "fp32"
    with DeviceCounts({}, default="") as device:
        device.place([A])
        assert resolved("auto", A, 0.6, 1e-4) == "fp16"
        assert resolved("tf32", A, 0.6, 1e-4) == "tf32"


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_program_s_switch_changes_nothing(setting):
    A = matrices().float()
    config = MinimaxConfig(matmul_precision="auto", relative_epsilon=1e-4)
    expected = inverse_root(A, 2, MinimaxConfig(relative_epsilon=1e-4)).value
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert torch.equal(inverse_root(A, 2, config).value, expected)
    finally:
        torch.set_float32_matmul_precision(before)
