"""State tensors are views of the stacks, in every way that matters to a checkpoint."""

import copy
import io

import pytest
import torch

from dash_shampoo.base import pack, unpack
from dash_shampoo.buckets.storage import MatrixStack


def symmetric(count, size, dtype=torch.float32):
    matrices = torch.randn(count, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return matrices + matrices.mT


def make(packed, count=3, size=4, dtype=torch.float32):
    values = symmetric(count, size, dtype)
    stored = pack(values) if packed else values
    tensors = [row.clone() for row in stored]
    return MatrixStack(tensors, size, packed), tensors, values


def test_pack_is_the_upper_triangle_row_by_row_and_unpack_its_inverse():
    values = symmetric(2, 5)
    row, column = torch.triu_indices(5, 5)
    assert torch.equal(pack(values), values[:, row, column])
    assert torch.equal(unpack(pack(values)), values)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_keep_their_values_and_become_views(packed, dtype):
    stack, tensors, values = make(packed, dtype=dtype)
    assert torch.equal(stack.read(slice(0, 3)), values)
    for tensor, row in zip(tensors, stack.data, strict=True):
        assert tensor.data_ptr() == row.data_ptr()
        assert tensor.storage_offset() == 0
    tensors[1].zero_()
    assert torch.count_nonzero(stack.data[1]) == 0
    stack.data[2].fill_(7.0)
    assert torch.all(tensors[2] == 7.0)


@pytest.mark.parametrize("packed", [False, True])
def test_no_second_copy_of_the_memory(packed):
    stack, tensors, _ = make(packed, count=8, size=16)
    addresses = {t.untyped_storage().data_ptr() for t in tensors}
    begin = stack.data.data_ptr()
    end = begin + stack.data.numel() * stack.data.element_size()
    assert len(addresses) == 8
    assert all(begin <= a < end for a in addresses)
    assert sum(t.untyped_storage().nbytes() for t in tensors) == end - begin


def test_saving_one_view_writes_one_view():
    _, tensors, _ = make(packed=False, count=64, size=32)
    alone, one_view = io.BytesIO(), io.BytesIO()
    torch.save(tensors[5].clone(), alone)
    torch.save(tensors[5], one_view)
    assert one_view.tell() <= alone.tell() + 64
    one_view.seek(0)
    assert torch.equal(torch.load(one_view), tensors[5])


def test_views_can_be_deep_copied():
    _, tensors, _ = make(packed=False)
    twin = copy.deepcopy(tensors[0])
    assert torch.equal(twin, tensors[0])
    assert twin.data_ptr() != tensors[0].data_ptr()


def test_the_stack_outlives_no_view():
    stack, tensors, values = make(packed=False)
    del stack
    assert torch.equal(tensors[2], values[2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_accumulation_of_outer_products(packed, decay):
    stack, tensors, values = make(packed, dtype=torch.float64)
    unfolded = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = values.clone()
    expected[1:] = decay * expected[1:] + 0.1 * unfolded @ unfolded.mT
    stack.accumulate_outer_(slice(1, 3), unfolded, decay=decay, weight=0.1)
    torch.testing.assert_close(stack.read(slice(0, 3)), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(torch.stack(tensors), stack.data)


@pytest.mark.parametrize("packed", [False, True])
def test_outer_products_are_taken_in_the_dtype_of_the_stack(packed):
    """Rounded to bf16 before they are summed, they would make the matrix indefinite."""
    stack, _, _ = make(packed, count=1, size=32)
    stack.data.zero_()
    generator = torch.Generator().manual_seed(0)
    unfolded = torch.randn(1, 32, 8, generator=generator).bfloat16()
    stack.accumulate_outer_(slice(0, 1), unfolded, decay=0.9, weight=1.0)
    exact = unfolded.double() @ unfolded.double().mT
    torch.testing.assert_close(stack.read(slice(0, 1)).double(), exact, rtol=1e-5, atol=1e-5)
    smallest = torch.linalg.eigvalsh(stack.read(slice(0, 1)).double()).min()
    rounded = (unfolded @ unfolded.mT).double()
    assert torch.linalg.eigvalsh(rounded).min() < -1e-2 < smallest


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([0, 2])])
def test_write_and_read_back(packed, rows):
    stack, _, values = make(packed)
    stack.write_(rows, -values[rows])
    assert torch.equal(stack.read(rows), -values[rows])


def test_mixed_shapes_or_dtypes_are_refused():
    with pytest.raises(ValueError, match="Cannot stack"):
        MatrixStack([torch.eye(3), torch.eye(4)], 3, packed=False)
    with pytest.raises(ValueError, match="Cannot stack"):
        MatrixStack([torch.eye(3), torch.eye(3).double()], 3, packed=False)


def test_empty_matrices_are_allowed():
    stack = MatrixStack([torch.empty(0, 0), torch.empty(0, 0)], 0, packed=False)
    assert stack.read(slice(0, 2)).shape == (2, 0, 0)
