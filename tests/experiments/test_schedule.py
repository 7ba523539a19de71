from functools import partial

import pytest
import torch

from experiments.builders import build
from experiments.schedule import (
    LearningRate,
    cosine_with_restarts,
    one_cycle,
    warmup_stable_decay,
)
from tests.experiments.composing import composed, options

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


def wsd(step, steps=100, warmup=0.1, decay=0.4, end=0.2):
    return warmup_stable_decay(
        step, steps, warmup_fraction=warmup, decay_fraction=decay, end_factor=end
    )


def test_it_rises_stays_and_falls():
    factors = [wsd(step) for step in range(100)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10:60] == [1.0] * 50
    assert factors[60:] == pytest.approx([0.2 + 0.8 * left / 40 for left in range(39, -1, -1)])
    linear = [wsd(step, decay=1.0, end=0.0) for step in range(100)]
    assert linear[9] == pytest.approx(89.9 / 90, abs=0.02)
    assert linear[-1] == 0.0
    assert sorted(linear[10:], reverse=True) == linear[10:]
    assert [wsd(step, decay=0.0, end=1.0) for step in range(10, 100)] == [1.0] * 90


def test_it_restarts():
    factors = [
        cosine_with_restarts(step, 110, warmup_fraction=1 / 11, cycles=4, end_factor=0.1)
        for step in range(110)
    ]
    starts = [step for step in range(10, 110) if factors[step] == 1.0]
    assert starts == [10, 35, 60, 85]
    for start in starts:
        fall = factors[start : start + 25]
        assert fall == sorted(fall, reverse=True)
        assert fall[-1] == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="cycles=0 must be a whole number of at least 1"):
        cosine_with_restarts(0, 10, warmup_fraction=0.1, cycles=0, end_factor=0.1)


@pytest.mark.parametrize("name", options("schedule"))
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_each_schedule_stays_between_0_and_1(name, steps):
    factor = build(composed([f"schedule={name}"]).schedule, "schedule")
    assert all(0.0 <= factor(step, steps) <= 1.0 for step in range(steps))
    assert max(factor(step, 100) for step in range(100)) > 0.95
