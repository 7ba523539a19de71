"""``python -m experiments sweep``: many runs of ``train``, one after the other, and which is best.

Hydra's multirun tries every combination of the values given with commas. A sweep that was stopped
goes on where it was when the same command is given again.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import train
from experiments.main import through_hydra
from experiments.report import write
from experiments.runs import experiments, find_runs
from experiments.settings import SettingsError, require
from experiments.tables import markdown_table, spread

# Set in a worker: it trains what no other worker has, and leaves the results to its parent.
_WORKER = "EXPERIMENTS_WORKER"
_HELP = """\
usage: python -m experiments sweep [--workers N] output_dir=FOLDER KEY=VALUE,VALUE,... [KEY=VALUE] ...

Trains with every combination of the values, each in a folder of its own below FOLDER; the settings
are those of train. The same command again goes on where it was stopped. N runs at a time share the
cores, or have a GPU each. Then the results, best first, and a page about them, FOLDER/report.html.

examples:
  python -m experiments sweep output_dir=sweeps/lr optimizer=adamw,muon optimizer.lr=1e-3,2e-3,4e-3 seed=1,2
  python -m experiments sweep output_dir=sweeps/solvers optimizer=dash solver=eigen,newton_db,minimax
  python -m experiments sweep --workers 8 output_dir=sweeps/exponents optimizer=dash solver=minimax \
      'optimizer.preconditioner_config.inverse_exponent_override={2: 0.25},{2: 0.5}' seed=1,2
"""


def main(words: Sequence[str]) -> int:
    """Carry out ``sweep``.

    Args:
        words: The command line after ``sweep``.

    Returns:
        Exit status, as of `experiments.main.main`.

    Raises:
        SettingsError: If there is no folder.
    """
    if not words or {"-h", "--help"} & set(words):
        print(_HELP, end="")
        sys.exit(0)
    folders = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    if not folders:
        raise SettingsError("output_dir=... must be given: the folder of all runs of the sweep.")
    workers, words = _workers(words)
    if workers > 1:
        status = _together(workers, words)
    else:
        status = through_hydra("train", train.run, [*words, "--multirun"])
    if _WORKER in os.environ:
        return status
    runs = find_runs([Path(folders[-1])]) if Path(folders[-1]).is_dir() else []
    if runs:
        found = experiments(runs)
        rows = [
            [e.label, str(len(e.runs)), spread(e.final_losses, "{:.4f}") or "diverged"]
            for e in found
        ]
        print("\n" + markdown_table(["experiment, best first", "seeds", "validation loss"], rows))
        print(f"All of it: {write(found, Path(folders[-1]) / 'report.html')}")
    return status


def _workers(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number of workers, and the other words."""
    kept = list(words)
    if "--workers" not in kept:
        return 1, kept
    place = kept.index("--workers")
    number = "".join(kept[place + 1 : place + 2])
    require(number.isdigit() and int(number) > 0, "--workers", number, "at least 1")
    return int(number), kept[:place] + kept[place + 2 :]


def _together(workers: int, words: Sequence[str]) -> int:
    """Go through the sweep in several processes; a run belongs to the first that comes to it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    threads = str(max((os.cpu_count() or 1) // workers, 1))
    command = [sys.executable, "-m", "experiments", "sweep", *words]
    running = []
    for number in range(workers):
        environment = {"OMP_NUM_THREADS": threads, **os.environ, _WORKER: str(number)}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        running.append(subprocess.Popen(command, env=environment))
    statuses = []
    for one in running:
        while True:
            try:
                statuses.append(one.wait())
                break
            except KeyboardInterrupt:
                continue  # they have got it too, and write their checkpoints
    return max(s if s >= 0 else 128 - s for s in statuses)
