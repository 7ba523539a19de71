"""The kernels beside the square: numbers by Triton's interpreter, predicates, operators, callers."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import dash_shampoo as ds
from benchmarks.cases import Case
from benchmarks.device_counts import DeviceCounts
from benchmarks.launches import count_steps
from dash_shampoo.preconditioners.modes import contract, unfold
from dash_shampoo.products import outer, precision, sides
from dash_shampoo.products.outer import OUTER_PRECISIONS, accumulate_outer_, can_use_outer
from dash_shampoo.products.sides import SIDED_PRECISIONS, can_use_two_sided, two_sided
from dash_shampoo.products.tiles import Tiles, find_tiles
from tests.products.fused_cases import DECAY, DTYPES, UPDATES, WEIGHT, make_sides, make_update

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")


@pytest.mark.parametrize(("kernel", "number"), [("outer", 120), ("two_sided", 24)])
def test_the_kernels_are_as_accurate_as_torch_s_products(interpreted, kernel, number):
    cases = interpreted[kernel]
    assert len(cases) == number
    for key, case in cases.items():
        # The order of the sums differs: some roundings of float32 beside those of the operands.
        assert case["error"] <= 1.05 * case["reference"] + 2e-7, (key, case)


def test_factor_matrices_are_symmetric_and_others_are_kept(interpreted):
    assert all(
        case["is_symmetric"] and case["are_others_kept"] for case in interpreted["outer"].values()
    )


def test_gradients_of_half_precision_are_multiplied_without_an_error(interpreted):
    errors = [
        case["error"] for key, case in interpreted["outer"].items() if not key.startswith("tf32")
    ]
    assert max(errors) < 2e-7


# ----------------------------------------------------------------------------- predicates


@pytest.fixture
def device():
    with DeviceCounts({}, default="outside") as counting:
        yield counting


@needs_triton
def test_which_updates_the_kernel_takes(device, monkeypatch):
    def is_taken(size, columns, dtype=torch.float32, factors=torch.float32, packed=False):
        shape = (2, size * (size + 1) // 2) if packed else (2, size, size)
        F, U = torch.zeros(shape, dtype=factors), torch.zeros(2, size, columns, dtype=dtype)
        device.place([F, U])
        return can_use_outer(F, U)

    assert not can_use_outer(torch.zeros(2, 8, 8), torch.zeros(2, 8, 4)), "it is on the CPU"
    assert [is_taken(n, 16) for n in (512, 513)] == [False, True], "by the table"
    assert is_taken(64, 16, packed=True)
    middle = torch.zeros(2, 64, 2, 3)
    F = torch.zeros(2, 64, 64)
    device.place([F, middle])
    assert can_use_outer(F, middle), "torch would copy the unfolding"
    assert is_taken(64, 16, dtype=torch.bfloat16)
    assert not is_taken(64, 16, dtype=torch.float64)
    assert not is_taken(64, 16, dtype=torch.bfloat16, factors=torch.bfloat16)
    assert [is_taken(16, n, packed=True) for n in (1024, 1025)] == [True, False], (
        "long sums are split"
    )
    assert not is_taken(16, 0, packed=True)
    assert not is_taken(64, 16)
    monkeypatch.setattr(outer, "is_tf32_allowed", lambda: True)
    assert is_taken(64, 16), "where TF32 is allowed, it is taken on tensor cores"


@needs_triton
def test_which_products_the_kernel_takes(device, monkeypatch):
    def is_taken(rows, columns, dtype):
        operands = make_sides(rows, columns, dtype)
        device.place(operands)
        return can_use_two_sided(*operands)

    assert not can_use_two_sided(*make_sides(8, 8, torch.bfloat16)), "it is on the CPU"
    assert [is_taken(n, 8, torch.bfloat16) for n in (256, 257)] == [True, False], "by the table"
    assert [is_taken(8, n, torch.float16) for n in (256, 257)] == [True, False]
    assert not is_taken(8, 8, torch.float32), "exact products have no tensor cores"
    assert not is_taken(8, 8, torch.float64)
    monkeypatch.setattr(sides, "is_tf32_allowed", lambda: True)
    assert is_taken(8, 8, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not is_taken(8, 8, torch.float32)


# ------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("name", OUTER_PRECISIONS)
def test_the_operator_of_the_update_on_the_cpu(name, kind, is_packed):
    update = make_update(kind, 24, DTYPES[name], is_packed)
    truth = update.truth()
    accumulate_outer_(update.stack[update.rows], update.unfolded, DECAY, WEIGHT)
    torch.testing.assert_close(update.old.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIDED_PRECISIONS)
def test_the_operator_of_both_sides_on_the_cpu(name):
    G, X, Y = make_sides(20, 12, DTYPES[name])
    result = two_sided(G, X, Y)
    truth = X.double().mT @ G.double() @ Y.double()
    assert result.dtype == G.dtype
    assert result.is_contiguous()
    assert (result - truth).norm() / truth.norm() < {"tf32": 1e-3, "fp16": 1e-3, "bf16": 1e-2}[name]


def test_unfoldings_are_views_and_have_the_columns_in_order():
    blocks = torch.randn(4, 2, 3, 5)
    for dimension, shape in ((0, (4, 2, 15)), (1, (4, 3, 2, 5)), (2, (4, 5, 6))):
        unfolded = unfold(blocks, dimension)
        assert unfolded.shape == shape
        assert unfolded.untyped_storage().data_ptr() == blocks.untyped_storage().data_ptr()
        expected = blocks.movedim(dimension + 1, 1).flatten(2)
        assert torch.equal(unfolded.flatten(2), expected)


# ----------------------------------------------------------------------------- in a step


def count(config, shapes=(((96, 64), 3), ((64,), 2)), **settings):
    case = Case("", list(shapes), 128)
    _, without = count_steps(case, ds.DashShampoo, preconditioner_config=config, **settings)
    return without


PACKED = ds.RootInvShampooPreconditionerConfig(use_symmetric_packing=True)


@needs_triton
def test_a_packed_update_is_one_launch_per_stack_without_a_pass_or_memory(monkeypatch):
    with_kernel = count(PACKED)
    assert with_kernel.operations["factor update", "accumulate_outer_"] == 3
    assert with_kernel.launches["factor update"] == 3
    assert with_kernel.elements["factor update"] == 0
    monkeypatch.setattr(outer, "can_use_kernel", lambda *arguments: False)
    without = count(PACKED)
    # Products, their triangles, decay and addition, each in memory of its own.
    assert without.launches["factor update"] == 12
    assert without.elements["factor update"] > 3 * (3 * 96 * 97 + 3 * 64 * 65) // 2


@needs_triton
def test_half_operands_make_directions_in_one_launch(monkeypatch):
    config = replace(PACKED, inv_factor_matrix_dtype=torch.bfloat16, use_symmetric_packing=False)
    with_kernel = count(config, [((96, 64), 3)])
    assert with_kernel.operations["precondition", "two_sided_"] == 1
    assert with_kernel.launches["precondition"] == 1
    monkeypatch.setattr(sides, "can_use_kernel", lambda *arguments: False)
    # The gradients and the directions are cast.
    assert count(config, [((96, 64), 3)]).launches["precondition"] == 4


@needs_triton
def test_a_side_alone_is_torch_s():
    config = ds.RootInvKLShampooPreconditionerConfig(
        inv_factor_matrix_dtype=torch.bfloat16, use_symmetric_packing=False
    )
    with_kernel = count(config, [((96, 64), 3)])
    assert with_kernel.operations["precondition", "two_sided_"] == 1
    assert with_kernel.operations["precondition", "bmm"] == 2


@needs_triton
def test_parameters_are_those_of_torch_s_products(device, monkeypatch):
    G, X, Y = make_sides(20, 12, torch.bfloat16)
    device.place([G, X, Y])
    with_kernel = contract(G, {0: X, 1: Y}, torch.bfloat16)
    assert device.counts.operations["outside", "two_sided_"] == 1
    monkeypatch.setattr(sides, "can_use_kernel", lambda *arguments: False)
    torch.testing.assert_close(
        with_kernel.float(), contract(G, {0: X, 1: Y}, torch.bfloat16).float(), rtol=1e-2, atol=1e-2
    )


# --------------------------------------------------------------------------- on a device


@needs_cuda
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("name", OUTER_PRECISIONS)
@pytest.mark.parametrize("size", [17, 64, 131, 600, 1000])
def test_updates_on_a_device(name, kind, size, is_packed):
    from dash_shampoo.products import kernels

    update = make_update(kind, size, DTYPES[name], is_packed)
    truth = update.truth()
    stack, unfolded = update.stack.cuda(), update.unfolded.cuda()
    rows = "outer_small" if is_packed or kind == "middle" else "outer"
    tiles = find_tiles(rows, torch.cuda.get_device_capability(), name, size)
    tiles = tiles if tiles.tile else Tiles(0, 64, 16, 4, 3)
    outer.launch_outer(
        kernels.accumulate_outer, tiles, stack[update.rows], unfolded, DECAY, WEIGHT, name
    )
    result = update.matrices(stack.cpu())
    assert (result - truth).norm() / truth.norm() <= (1e-3 if name == "tf32" else 1e-6)
    assert torch.equal(result, result.mT)


@needs_cuda
@pytest.mark.parametrize("name", SIDED_PRECISIONS)
@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (33, 128), (256, 200), (12, 100)])
def test_both_sides_on_a_device(name, shape):
    G, X, Y = make_sides(*shape, DTYPES[name])
    truth = X.double().mT @ G.double() @ Y.double()
    on_device = [tensor.cuda() for tensor in (G, X, Y)]
    with precision.tf32_switch(is_allowed=name == "tf32"):
        assert can_use_two_sided(*on_device)
        result = two_sided(*on_device).cpu()
    assert (result - truth).norm() / truth.norm() < {"tf32": 1e-3, "fp16": 1e-3, "bf16": 1e-2}[name]
