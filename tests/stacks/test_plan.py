"""The plan is pure: every block in one bucket, every factor in one slot, whatever the shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dash_shampoo.stacks import BlockSpec, activate, num_rows, plan_stacks, split_rows

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
    plan = plan_stacks(blocks)
    assert sorted(i for bucket in plan.buckets for i in bucket.blocks) == list(range(len(blocks)))
    slots = [slot for stack in plan.stacks for slot in stack.slots]
    expected = [(i, n) for i, block in enumerate(blocks) for n in range(len(block.roots))]
    assert sorted(slots) == expected
    for bucket in plan.buckets:
        for number, factor in enumerate(bucket.factors):
            stack = plan.stacks[factor.stack]
            assert stack.size == bucket.spec.shape[factor.dimension]
            assert stack.root == bucket.spec.roots[number]
            members = stack.slots[factor.start : factor.start + len(bucket.blocks)]
            assert members == tuple((i, number) for i in bucket.blocks)


@given(block_lists(), st.data())
def test_active_rows_are_exactly_those_of_active_blocks(blocks, data):
    plan = plan_stacks(blocks)
    selector = data.draw(st.tuples(*[st.booleans() for _ in blocks]))
    active = activate(plan, selector)
    chosen = [i for i, a in enumerate(selector) if a]
    assert sorted(p for b in active.buckets for p in b.positions) == list(range(len(chosen)))
    for stack in active.stacks:
        every = torch.arange(len(plan.stacks[stack.stack].slots))
        found = [plan.stacks[stack.stack].slots[i] for i in every[stack.rows].tolist()]
        assert tuple(found) == stack.slots
        assert {i for i, _ in found} <= set(chosen)
    assert sum(len(s.slots) for s in active.stacks) == sum(len(blocks[i].roots) for i in chosen)
    for bucket in active.buckets:
        for rows, factor in zip(bucket.rows, bucket.bucket.factors, strict=True):
            slots = plan.stacks[factor.stack].slots
            picked = [slots[i][0] for i in torch.arange(len(slots))[rows].tolist()]
            assert picked == [chosen[p] for p in bucket.positions]


def test_all_active_needs_no_gather():
    plan = plan_stacks([spec((8, 8)), spec((3, 8)), spec((8, 8)), spec((8,))])
    active = activate(plan, (True,) * 4)
    assert all(isinstance(stack.rows, slice) for stack in active.stacks)
    assert all(isinstance(rows, slice) for bucket in active.buckets for rows in bucket.rows)


def test_contiguous_active_blocks_are_a_slice_and_others_an_index():
    plan = plan_stacks([spec((4,))] * 4)
    assert activate(plan, (False, True, True, False)).stacks[0].rows == slice(1, 3)
    rows = activate(plan, (True, False, True, False)).stacks[0].rows
    assert isinstance(rows, torch.Tensor)
    assert rows.tolist() == [0, 2]


def test_left_and_right_factors_share_a_stack_across_buckets():
    """The example of the paper: 62 blocks of 1024 and 2 ragged ones give stacks of 126 and 2."""
    plan = plan_stacks([spec((1024, 1024))] * 62 + [spec((256, 1024))] * 2)
    assert sorted((s.size, len(s.slots)) for s in plan.stacks) == [(256, 2), (1024, 126)]


def test_roots_split_stacks():
    plan = plan_stacks([spec((8, 8), roots=(2.0, 4.0)), spec((8,), roots=(2.0,))])
    assert sorted((s.size, s.root, len(s.slots)) for s in plan.stacks) == [(8, 2.0, 2), (8, 4.0, 1)]


def test_no_blocks_no_stacks():
    plan = plan_stacks([])
    assert (plan.buckets, plan.stacks) == ((), ())
    assert activate(plan, ()).stacks == ()


@pytest.mark.parametrize("rows", [slice(2, 9), torch.tensor([0, 4, 5, 11])])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_split_rows_keeps_every_row_in_order(rows, size):
    every = torch.arange(12)
    parts = split_rows(rows, size)
    assert torch.equal(torch.cat([every[part] for part in parts]), every[rows])
    assert all(1 <= num_rows(part) <= size for part in parts)


def test_a_spec_with_too_few_roots_is_refused():
    with pytest.raises(ValueError, match="one root per selected dimension"):
        BlockSpec((4, 4), (True, True), (4.0,), torch.float32, CPU)
