"""Blocks as grids in memory: views of many blocks, and updates with one addition for each grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_shampoo.base.embedded import DistributedShampoo, keys
from dash_shampoo.base.embedded.blocking import (
    BlockGrid,
    GridBlocks,
    equal_grids,
    multi_dim_split,
)
from tests.base.cases import gradients, parameters, take_steps

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, split_size=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_pieces_of_a_tensor_lie_in_grids(shape, split_size, order):
    dims = list(range(len(shape)))
    order.shuffle(dims)
    memory = torch.arange(3 + math.prod(shape))
    tensor = memory[3:].view([shape[d] for d in dims])
    tensor = tensor.permute([dims.index(d) for d in range(len(shape))])
    blocks = multi_dim_split(tensor, split_size)
    seen = []
    for grid in equal_grids(tensor.shape, split_size):
        seen.extend(grid.numbers)
        view = grid.of(tensor)
        assert list(grid.numbers) == sorted(grid.numbers)
        assert view.shape == (*grid.counts, *blocks[grid.numbers[0]].shape)
        assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        cut = GridBlocks([BlockGrid(tuple(range(len(grid.numbers))), grid.counts, view)], [view])
        assert len(cut) == len(grid.numbers)
        for found, number in zip(cut, grid.numbers, strict=True):
            torch.testing.assert_close(found, blocks[number], rtol=0, atol=0)
    assert sorted(seen) == list(range(len(blocks)))


@pytest.mark.parametrize("split_size", [8, math.inf])
def test_a_tensor_that_is_one_block_is_its_own_grid(split_size):
    tensor = torch.zeros(8, 3)
    (grid,) = equal_grids(tensor.shape, split_size)
    assert (grid.numbers, grid.counts) == ((0,), ())
    assert grid.of(tensor) is tensor


def test_blocks_of_several_grids_are_in_the_order_of_their_positions():
    grids = [BlockGrid((0, 2), (2,), torch.zeros(2, 3)), BlockGrid((1,), (), torch.zeros(3))]
    blocks = GridBlocks(grids, [torch.arange(6).view(2, 3), torch.full((3,), 9)])
    assert [block.tolist() for block in blocks] == [[0, 1, 2], [9, 9, 9], [3, 4, 5]]


class InGrids(DistributedShampoo):
    """Directions in one tensor for each grid, as a step on buckets gives them."""

    def _compute_search_directions(self, state_lists, *args, **kwargs):
        blocks = super()._compute_search_directions(state_lists, *args, **kwargs)
        grids = state_lists[keys.DISTRIBUTOR].grids
        tensors = [
            torch.stack([blocks[i] for i in grid.positions]).view(grid.target.shape)
            for grid in grids
        ]
        return GridBlocks(grids, tensors)


@pytest.mark.parametrize("missing", ["never", "changing"])
def test_directions_in_grids_are_added_grid_by_grid(missing, monkeypatch):
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

    optimizer = InGrids(found, **options)
    monkeypatch.setattr(torch, "_foreach_add_", counting)
    take_steps(optimizer, found, steps)
    for p, q in zip(found, expected, strict=True):
        assert torch.equal(p, q)
    # Ragged at block 8: 20 x 13 in four grids, 9 x 3 x 5 and 2 x 3 x 9 x 4 in two.
    grids = [1, 1, 1, 1, 1, 4, 1, 2, 2]
    assert lengths == [
        sum(grids[i] for i, grad in enumerate(grads) if grad is not None) for grads in steps
    ]
