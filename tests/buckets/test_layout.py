"""The layout is pure: every block in one bucket, every factor in one slot, whatever the shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dash_shampoo.buckets.layout import BlockSpec, make_layout, num_rows, rows_of, subset

CPU = torch.device("cpu")


def spec(shape, selector=None, roots=None, dtype=torch.float32):
    selector = tuple(selector) if selector is not None else (True,) * len(shape)
    roots = roots or (2.0 * max(len(shape), 1),) * sum(selector)
    return BlockSpec(tuple(shape), selector, tuple(roots), dtype, CPU)


shapes = st.lists(st.sampled_from([1, 3, 8]), max_size=5).map(tuple)


@st.composite
def block_lists(draw):
    blocks = []
    for shape in draw(st.lists(shapes, max_size=12)):
        selector = draw(st.tuples(*[st.booleans() for _ in shape]))
        roots = draw(st.tuples(*[st.sampled_from([2.0, 4.0]) for _ in range(sum(selector))]))
        blocks.append(
            spec(shape, selector, roots, draw(st.sampled_from([torch.float32, torch.bfloat16])))
        )
    return blocks


@given(block_lists())
def test_every_block_has_one_bucket_and_every_factor_one_slot(blocks):
    layout = make_layout(blocks)
    assert sorted(i for bucket in layout.buckets for i in bucket.blocks) == list(range(len(blocks)))
    slots = [slot for stack in layout.stacks for slot in stack.slots]
    expected = [(i, n) for i, block in enumerate(blocks) for n in range(len(block.roots))]
    assert sorted(slots) == expected
    for bucket in layout.buckets:
        for number, factor in enumerate(bucket.factors):
            stack = layout.stacks[factor.stack]
            assert stack.size == bucket.spec.shape[factor.dimension]
            assert stack.root == bucket.spec.roots[number]
            members = stack.slots[factor.start : factor.start + len(bucket.blocks)]
            assert members == tuple((i, number) for i in bucket.blocks)


@given(block_lists(), st.integers(1, 7), st.data())
def test_shares_cut_the_active_stacks_evenly_and_where_all_blocks_would_be_cut(blocks, count, data):
    layout = make_layout(blocks)
    selector = data.draw(st.tuples(*[st.booleans() for _ in blocks]))

    def members(active):
        shares = active.shares(count)
        assert len(shares) == count
        for share in shares:
            for one in share:
                every = torch.arange(len(layout.stacks[one.stack].slots))
                slots = layout.stacks[one.stack].slots
                assert tuple(slots[i] for i in every[one.rows].tolist()) == one.slots != ()
        return [{(one.stack, slot) for one in share for slot in one.slots} for share in shares]

    some, every = members(layout.active(selector)), members(layout.active((True,) * len(blocks)))
    active = {(s.stack, slot) for s in layout.active(selector).stacks for slot in s.slots}
    assert [share & active for share in every] == some
    assert sum(map(len, every)) == sum(len(stack.slots) for stack in layout.stacks)
    assert set.union(*every) == {
        (number, slot) for number, stack in enumerate(layout.stacks) for slot in stack.slots
    }
    work = [sum(layout.stacks[number].size ** 3 for number, _ in share) for share in every]
    largest = max((stack.size**3 for stack in layout.stacks), default=0)
    assert max(work) <= sum(work) / count + largest


@given(block_lists(), st.data())
def test_active_rows_are_exactly_those_of_active_blocks(blocks, data):
    layout = make_layout(blocks)
    selector = data.draw(st.tuples(*[st.booleans() for _ in blocks]))
    active = layout.active(selector)
    chosen = [i for i, a in enumerate(selector) if a]
    assert sorted(p for b in active.pieces for p in b.positions) == list(range(len(chosen)))
    for stack in active.stacks:
        every = torch.arange(len(layout.stacks[stack.stack].slots))
        found = [layout.stacks[stack.stack].slots[i] for i in every[stack.rows].tolist()]
        assert tuple(found) == stack.slots
        assert {i for i, _ in found} <= set(chosen)
    assert sum(len(s.slots) for s in active.stacks) == sum(len(blocks[i].roots) for i in chosen)
    for piece in active.pieces:
        assert piece.blocks == tuple(chosen[p] for p in piece.positions)
        for factor in piece.bucket.factors:
            slots = layout.stacks[factor.stack].slots[piece.factor_rows(factor)]
            assert [block for block, _ in slots] == list(piece.blocks)


def test_all_active_needs_no_gather():
    layout = make_layout([spec((8, 8)), spec((3, 8)), spec((8, 8)), spec((8,))])
    active = layout.active((True,) * 4)
    assert all(isinstance(stack.rows, slice) for stack in active.stacks)
    assert [piece.slots for piece in active.pieces] == [slice(0, 2), slice(0, 1), slice(0, 1)]


def test_contiguous_active_blocks_are_a_slice_and_others_an_index():
    layout = make_layout([spec((4,))] * 4)
    assert layout.active((False, True, True, False)).stacks[0].rows == slice(1, 3)
    rows = layout.active((True, False, True, False)).stacks[0].rows
    assert isinstance(rows, torch.Tensor)
    assert rows.tolist() == [0, 2]


def test_left_and_right_factors_share_a_stack_across_buckets():
    """The example of the paper: 62 blocks of 1024 and 2 ragged ones give stacks of 126 and 2."""
    layout = make_layout([spec((1024, 1024))] * 62 + [spec((256, 1024))] * 2)
    assert sorted((s.size, len(s.slots)) for s in layout.stacks) == [(256, 2), (1024, 126)]


def test_roots_split_stacks():
    layout = make_layout([spec((8, 8), roots=(2.0, 4.0)), spec((8,), roots=(2.0,))])
    assert sorted((s.size, s.root, len(s.slots)) for s in layout.stacks) == [
        (8, 2.0, 2),
        (8, 4.0, 1),
    ]


def test_no_blocks_no_stacks():
    layout = make_layout([])
    assert (layout.buckets, layout.stacks) == ((), ())
    assert layout.active(()).stacks == ()


def test_alternating_blocks_are_pieces_of_one_slot_and_neighbours_one_piece():
    layout = make_layout([spec((4,))] * 6)
    active = layout.active((True, False, True, True, False, True))
    assert [piece.slots for piece in active.pieces] == [slice(0, 1), slice(2, 4), slice(5, 6)]
    assert [piece.positions for piece in active.pieces] == [(0,), (1, 2), (3,)]


def test_a_selection_is_remembered_and_few_are_kept():
    layout = make_layout([spec((4,))] * 5)
    first = layout.active((True,) * 5)
    assert layout.active((True,) * 5) is first
    for number in range(32):
        layout.active(tuple(bool(number >> bit & 1) for bit in range(5)))
    assert layout.active.cache_info().currsize <= 16


@pytest.mark.parametrize("rows", [slice(2, 9), torch.tensor([0, 4, 5, 11])])
def test_a_subset_of_rows_is_that_part_of_them(rows):
    every = torch.arange(12)
    assert torch.equal(every[subset(rows, slice(1, 3))], every[rows][1:3])
    assert num_rows(subset(rows, slice(1, 3))) == 2


def test_rows_are_a_slice_where_they_can_be():
    assert rows_of([3, 4, 5], CPU) == slice(3, 6)
    assert torch.equal(rows_of([3, 5], CPU), torch.tensor([3, 5]))


def test_a_spec_with_too_few_roots_is_refused():
    with pytest.raises(ValueError, match="one root per selected dimension"):
        BlockSpec((4, 4), (True, True), (4.0,), torch.float32, CPU)
