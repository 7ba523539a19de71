from functools import partial

import pytest
import torch

from experiments.schedule import LearningRate, one_cycle

SHAPE = {"warmup_fraction": 0.1, "start_factor": 0.01, "end_factor": 0.1}


@pytest.mark.parametrize("steps", [10, 37, 200])
def test_the_factor_is_that_of_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.3,
        total_steps=steps,
        pct_start=0.1 if steps > 10 else 0.3,
        div_factor=100,
        final_div_factor=0.1,
        cycle_momentum=False,
    )
    for step in range(steps):
        factor = one_cycle(step, steps, **SHAPE | {"warmup_fraction": 0.1 if steps > 10 else 0.3})
        assert 0.3 * factor == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        if step < steps - 1:
            theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_short_runs_have_a_learning_rate(steps, warmup):
    factors = [
        one_cycle(step, steps, **SHAPE | {"warmup_fraction": warmup}) for step in range(steps)
    ]
    assert all(0.01 <= factor <= 1.0 for factor in factors)


def test_without_warm_up_it_only_falls():
    factors = [one_cycle(step, 50, **SHAPE | {"warmup_fraction": 0.0}) for step in range(50)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_groups_keep_their_proportion():
    one, two = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one], "lr": 1.0}, {"params": [two], "lr": 0.25}])
    schedule = LearningRate(optimizer, 100, partial(one_cycle, **SHAPE))
    for step in (0, 9, 50, 99, 3):
        assert schedule.apply(step) == optimizer.param_groups[0]["lr"]
        assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"] / 4
    assert schedule.apply(9) == 1.0
