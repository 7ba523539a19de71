"""The bookkeeping of blocks that are done at different steps."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dash_shampoo.inverse_root.working_set import WorkingSet


@settings(max_examples=100, deadline=None)
@given(
    lifetimes=st.lists(st.integers(0, 12), min_size=1, max_size=20), size=st.sampled_from([2, 3])
)
def test_every_block_is_retired_once_in_its_own_step(lifetimes: list[int], size: int) -> None:
    num_blocks = len(lifetimes)
    stack = (
        torch.arange(num_blocks, dtype=torch.float32)[:, None, None].expand(-1, size, size).clone()
    )
    life = torch.tensor(lifetimes)
    working = WorkingSet(num_blocks)
    for step in range(20):
        steps = torch.full((len(stack),), step)
        working.retire(life[working.rows] > step, stack, steps)
        if working.is_done:
            break
        (stack,) = working.compact(stack)
        assert len(stack) == len(working.rows)
    stack, retired_at = working.results
    assert stack[:, 0, 0].tolist() == list(range(num_blocks)), "they follow the rows"
    assert retired_at.tolist() == lifetimes


def test_blocks_whose_alignment_would_change_stay_where_they_are() -> None:
    """MKL sums in another order where a matrix is not aligned to 16 bytes."""
    for size, is_moved in ((4, True), (3, False)):
        working, stack = WorkingSet(4), torch.zeros(4, size, size)
        working.retire(torch.tensor([True, False, False, False]), stack)
        (stack,) = working.compact(stack)
        assert len(stack) == (1 if is_moved else 4)
