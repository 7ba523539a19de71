"""The benchmark refreshes the blocks whose factor matrices changed most since their last root."""

from dataclasses import replace

import torch

import dash_shampoo as ds
from benchmarks.adaptive_refresh import LargestChange
from experiments.study.sides import Shampoo


def test_the_blocks_that_changed_most_are_refreshed() -> None:
    frequency = 5
    side = LargestChange(
        Shampoo(
            replace(ds.DefaultDashConfig, stagger_refresh=True),
            frequency=frequency,
            routing="all",
        )
    )
    model = torch.nn.ParameterList([torch.randn(4, 4) for _ in range(10)])
    optimizer = side.build(model, 0.01, 4)
    (lists,) = optimizer._per_group_state_lists  # type: ignore[attr-defined]
    shampoo = lists["shampoo_preconditioner_list"]
    refreshed: list[set[int]] = []
    compute = shampoo._compute

    def spy(active):
        refreshed[-1] |= {block for block, _ in active.slots}
        return compute(active)

    shampoo._compute = spy
    generator = torch.Generator().manual_seed(0)
    for step in range(frequency + 2):
        for number, param in enumerate(model):
            grad = torch.randn(4, 4, generator=generator)
            param.grad = grad * 100.0 if step >= frequency and number in (3, 7) else grad
        refreshed.append(set())
        optimizer.step()
    assert refreshed[frequency - 1] == set(range(10))
    assert refreshed[frequency] == {3, 7}
    assert len(refreshed[frequency + 1]) in range(2, 5)  # four matrices
