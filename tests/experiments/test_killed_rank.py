"""A rank that dies under torchrun: the restarted run goes on from the last checkpoint."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from experiments import checkpoint
from experiments.metrics import read_metrics
from tests.experiments.test_parallel import train_together
from tests.experiments.test_train import losses, tensors

NUM_STEPS, CHECKPOINT_EVERY = 16, 3
KILL_AFTER = 7
TIMEOUT = 240.0


def train_words(tiny):
    """Settings of a run with checkpoints."""
    return [
        *tiny,
        *("optimizer=dash", "optimizer.lr=0.01", "optimizer.precondition_frequency=2"),
        *("optimizer.epsilon=1e-4", "parallelism=ddp", "evaluate_every=10"),
        *(f"steps={NUM_STEPS}", f"checkpoint_every={CHECKPOINT_EVERY}"),
    ]


def torchrun(words, folder, log):
    """Two processes of `python -m experiments train`, which one agent starts and starts again."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "--monitor-interval", "0.1", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
            *("-m", "experiments", "train", *words, f"output_dir={folder}"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def finish(agent, log):
    """Waits for the end, and takes nobody along but the agent, which ends its own processes."""
    try:
        status = agent.wait(TIMEOUT)
    finally:
        if agent.poll() is None:
            agent.terminate()
            agent.wait(TIMEOUT)
    assert status == 0, Path(log.name).read_text()


def process_of_rank(agent, rank):
    """The child of the agent that has this rank in its environment."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in map(int, children):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank} among {children}")


def steps_done(folder):
    path = folder / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return max((r["step"] for r in records if r["event"] == "train"), default=0)


def kill_in_the_middle(agent, rank, folder):
    """Kills a rank once it is past a checkpoint; returns the last step that is on disk for sure."""
    deadline = time.monotonic() + TIMEOUT
    while steps_done(folder) < KILL_AFTER:
        assert agent.poll() is None, "the run ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    latest = checkpoint.newest_first(folder / "checkpoints")[0]
    os.kill(process_of_rank(agent, rank), signal.SIGKILL)
    return int(latest.name.rpartition("_")[2])


def last_state(folder):
    """Model and optimizer at the end, by path."""
    shards = folder / "checkpoints" / f"step_{NUM_STEPS:08d}" / "shards"
    dcp_to_torch_save(shards, folder / "whole.pt")
    # Written a moment ago by ourselves; not all that DCP keeps beside tensors is plain.
    return dict(tensors(torch.load(folder / "whole.pt", weights_only=False)))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tiny, tmp_path):
    words = train_words(tiny)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_together(words, straight)
    with (tmp_path / "log").open("w") as log:
        agent = torchrun(words, killed, log)
        try:
            saved = kill_in_the_middle(agent, 1, killed)
        finally:
            finish(agent, log)

    events = read_metrics(killed / "metrics.jsonl")
    resumed = [r["step"] for r in events if r["event"] == "resume"]
    assert len(resumed) == 1
    # It may have reached the next checkpoint before the signal.
    assert saved <= resumed[0] < NUM_STEPS
    assert resumed[0] >= KILL_AFTER - CHECKPOINT_EVERY
    assert resumed[0] % CHECKPOINT_EVERY == 0
    assert losses(killed) == losses(straight)
    assert [x[1] for x in losses(killed) if x[0] == "train"] == list(range(1, NUM_STEPS + 1))

    states = [last_state(folder) for folder in (straight, killed)]
    assert states[0].keys() == states[1].keys()
    assert any("factor_matrices" in key for key in states[0])
    assert [k for k, v in states[0].items() if not torch.equal(v, states[1][k])] == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the agent in /proc")
def test_a_stopped_run_tells_the_command_that_was_run(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "parallelism=ddp", "steps=100000", "evaluate_every=0"]
    folder = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        agent = torchrun(words, folder, log)
        try:
            deadline = time.monotonic() + TIMEOUT
            while steps_done(folder) < 3:
                assert agent.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            agent.terminate()  # torchrun passes it on to its processes
            agent.wait(TIMEOUT)
    text = (tmp_path / "log").read_text()
    line = next(line for line in text.splitlines() if "--nproc-per-node" in line)
    again = shlex.split(line)
    assert again[1:] == [*agent.args[1 : -len(words) - 1], *words, f"output_dir={folder}"]
    assert checkpoint.newest_first(folder / "checkpoints")
