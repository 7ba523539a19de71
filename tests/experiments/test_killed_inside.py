"""A rank that is killed inside of a step or of a save: the restarted run does what it would have done."""

from pathlib import Path

import pytest
import torch

from experiments import checkpoint
from experiments.metrics import read_metrics
from tests.experiments.test_killed_rank import finish, last_state, torchrun
from tests.experiments.test_train import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the agent in /proc"),
]
NUM_STEPS, CHECKPOINT_EVERY = 16, 3


def words(tiny):
    return [
        *tiny,
        *("optimizer=dash", "optimizer.lr=0.01", "optimizer.precondition_frequency=2"),
        *("optimizer.epsilon=1e-4", "parallelism=ddp", "evaluate_every=10"),
        *(f"steps={NUM_STEPS}", f"checkpoint_every={CHECKPOINT_EVERY}"),
    ]


@pytest.fixture(scope="module")
def straight():
    """Losses and last state of a run that nothing happens to; filled by the first test that runs."""
    return {}


@pytest.mark.parametrize(
    ("place", "rank", "number", "resumed_at"),
    [
        ("step", 1, 8, 6),
        ("open", 1, 9, 6),
        ("os.rename", 0, 9, 6),
    ],
)
def test_a_rank_killed_inside(tiny, tmp_path, straight, place, rank, number, resumed_at):
    runs = {"killed": ("tests.experiments.dying", place, str(rank), str(number))}
    if not straight:
        runs["straight"] = ("experiments",)
    for name, module in runs.items():
        with (tmp_path / f"{name}.log").open("w") as log:
            finish(torchrun(words(tiny), tmp_path / name, log, module), log)
    if not straight:
        folder = tmp_path / "straight"
        straight.update(losses=losses(folder), state=last_state(folder))

    killed = tmp_path / "killed"
    events = read_metrics(killed / "metrics.jsonl")
    assert [r["step"] for r in events if r["event"] == "resume"] == [resumed_at]
    assert losses(killed) == straight["losses"]
    state = last_state(killed)
    assert state.keys() == straight["state"].keys()
    assert [k for k, v in state.items() if not torch.equal(v, straight["state"][k])] == []
    # Nothing of what was interrupted is left.
    assert all(checkpoint.is_checkpoint(path) for path in (killed / "checkpoints").iterdir())
