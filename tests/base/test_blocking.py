"""Blocks as grids in memory: views of many blocks, and updates with one addition per parameter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_shampoo.base.embedded import DistributedShampoo, distributor
from dash_shampoo.base.embedded.blocking import equal_grids, grid_view, multi_dim_split
from tests.base.cases import gradients, parameters, take_steps

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, split_size=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_pieces_of_a_tensor_lie_in_grids(shape, split_size, order):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    tensor = torch.arange(math.prod(shape)).view([shape[d] for d in dims])
    tensor = tensor.permute([dims.index(d) for d in range(len(shape))])
    blocks = multi_dim_split(tensor, split_size)
    seen = []
    for numbers, counts in equal_grids(tensor.shape, split_size):
        seen.extend(numbers)
        view = grid_view([blocks[n] for n in numbers], counts)
        assert view.shape == (*counts, *blocks[numbers[0]].shape)
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        for found, number in zip(view.flatten(0, len(counts) - 1), numbers, strict=True):
            torch.testing.assert_close(found, blocks[number], rtol=0, atol=0)
    assert sorted(seen) == list(range(len(blocks)))


@settings(max_examples=30, deadline=None)
@given(num_slots=st.integers(1, 12), start=st.integers(0, 3), rows=st.integers(1, 3))
def test_consecutive_slots_of_a_stack_lie_in_a_grid(num_slots, start, rows):
    stack = torch.randn(start + num_slots * rows + 2, 3, 2)
    blocks = stack[start : start + num_slots * rows].unbind()
    view = grid_view(blocks, (rows, num_slots))
    assert torch.equal(view.flatten(0, 1), torch.stack(blocks))
    view.zero_()
    assert torch.equal(stack[start : start + num_slots * rows], torch.zeros(num_slots * rows, 3, 2))


def slots(*order, size=(2, 2)):
    stack = torch.zeros(8, *size)
    return [stack[index] for index in order]


@pytest.mark.parametrize(
    ("blocks", "counts"),
    [
        pytest.param(slots(0, 1, 3), (3,), id="a gap"),
        pytest.param(slots(0, 2, 1, 3), (4,), id="another order"),
        pytest.param(slots(3, 2, 1), (3,), id="backwards"),
        pytest.param(slots(0, 1, 2, 4), (2, 2), id="two rows and a gap"),
        pytest.param([torch.zeros(4, 4), torch.zeros(4, 4)], (2,), id="two storages"),
        pytest.param([slots(0)[0], slots(0)[0].view(torch.int32)], (2,), id="dtypes"),
        pytest.param([*slots(0), slots(1)[0].T], (2,), id="strides"),
        pytest.param([*slots(0), slots(1)[0].view(4)], (2,), id="shapes"),
        pytest.param(slots(0, 1, size=(0, 2)), (2,), id="empty"),
        pytest.param([torch.empty(2, device="meta")] * 2, (2,), id="no memory"),
    ],
)
def test_blocks_elsewhere_do_not_lie_in_a_grid(blocks, counts):
    assert grid_view(blocks, counts) is None


def test_neighbours_of_another_storage_are_not_read():
    memory = torch.zeros(4, 2)
    first = torch.from_numpy(memory.numpy()[:2])
    second = torch.from_numpy(memory.numpy()[2:])
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 16
    assert first.data_ptr() + 16 == second.data_ptr()
    assert grid_view([first, second], (2,)) is None


def test_counts_that_are_not_those_of_the_blocks_are_refused():
    with pytest.raises(ValueError, match=r"counts=\(2,\): they are not those of 3 blocks"):
        grid_view(slots(0, 1, 2), (2,))


class Stacked(DistributedShampoo):
    """Directions in the slots of one stack per shape, as a stacked list has them."""

    def _precondition_and_grafting(self, *args, **kwargs):
        directions = super()._precondition_and_grafting(*args, **kwargs)
        by_shape = {}
        for direction in directions:
            by_shape.setdefault(direction.shape, []).append(direction)
        slots = {shape: iter(torch.stack(own).unbind()) for shape, own in by_shape.items()}
        return tuple(next(slots[direction.shape]) for direction in directions)


@pytest.mark.parametrize("missing", ["never", "changing"])
def test_stacked_directions_are_added_parameter_by_parameter(missing, monkeypatch):
    steps = gradients(4, missing)
    expected, found = parameters(), parameters()
    options = {"max_preconditioner_dim": 8, "epsilon": 1e-3}
    take_steps(DistributedShampoo(expected, **options), expected, steps)

    lengths = []
    add = torch._foreach_add_

    def counting(targets, *args, **kwargs):
        # What is added to the memory of the parameters.
        storages = {p.untyped_storage().data_ptr() for p in found}
        if targets and targets[0].untyped_storage().data_ptr() in storages:
            lengths.append(len(targets))
        return add(targets, *args, **kwargs)

    optimizer = Stacked(found, **options)
    monkeypatch.setattr(torch, "_foreach_add_", counting)
    monkeypatch.setattr(distributor, "_prefers_grids", lambda device: True)
    take_steps(optimizer, found, steps)
    for p, q in zip(found, expected, strict=True):
        assert torch.equal(p, q)
    # Ragged at block 8: 20 x 13 in four grids, 9 x 3 x 5 and 2 x 3 x 9 x 4 in two.
    grids = [1, 1, 1, 1, 1, 4, 1, 2, 2]
    assert lengths == [
        sum(grids[i] for i, grad in enumerate(grads) if grad is not None) for grads in steps
    ]
