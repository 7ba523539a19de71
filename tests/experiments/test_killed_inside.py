"""A rank that is killed inside of a step or of a save: the restarted run does what it would have done."""

import signal

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from experiments import checkpoint
from experiments.metrics import read_metrics
from tests.experiments import dying
from tests.experiments.test_killed_rank import last_state, train_words
from tests.experiments.test_parallel import train_together
from tests.experiments.test_train import losses
from tests.processes import CONTEXT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def straight():
    """Losses and last state of a run that nothing happens to; filled by the first test that runs."""
    return {}


@pytest.fixture
def handlers():
    """Those of signals, which the agent replaces in its process: this one."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def run_by_agent(*arguments):
    """`dying.run` on two ranks, by the agent of torchrun, whose processes are forked instead of begun."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        monitor_interval=0.1,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        start_method=CONTEXT.get_start_method(),
    )
    elastic_launch(config, dying.run)(*arguments)


@pytest.mark.parametrize(
    ("place", "rank", "number", "resumed_at"),
    [
        ("step", 1, 8, 6),
        ("open", 1, 9, 6),
        ("os.rename", 0, 9, 6),
    ],
)
def test_a_rank_killed_inside(tiny, tmp_path, straight, handlers, place, rank, number, resumed_at):
    if not straight:
        folder = train_together(train_words(tiny), tmp_path / "straight")
        straight.update(losses=losses(folder), state=last_state(folder))
    killed = tmp_path / "killed"
    run_by_agent(place, rank, number, ["train", *train_words(tiny), f"output_dir={killed}"])
    events = read_metrics(killed / "metrics.jsonl")
    assert [r["step"] for r in events if r["event"] == "resume"] == [resumed_at]
    assert losses(killed) == straight["losses"]
    state = last_state(killed)
    assert state.keys() == straight["state"].keys()
    assert [k for k, v in state.items() if not torch.equal(v, straight["state"][k])] == []
    # Nothing of what was interrupted is left.
    assert all(checkpoint.is_checkpoint(path) for path in (killed / "checkpoints").iterdir())
