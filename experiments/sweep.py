"""``python -m experiments sweep``: many runs of ``train``, one after the other, and which is best.

Hydra's multirun tries every combination of the values given with commas. A sweep that was stopped
goes on where it was when the same command is given again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import train
from experiments.main import through_hydra
from experiments.report import write
from experiments.runs import experiments, find_runs
from experiments.settings import SettingsError
from experiments.tables import markdown_table, spread

_HELP = """\
usage: python -m experiments sweep output_dir=FOLDER KEY=VALUE,VALUE,... [KEY=VALUE] ...

Trains with every combination of the values, each in a folder of its own below FOLDER; the settings
are those of train. The same command again goes on where it was stopped. Then the results, best
first, and a page about them, FOLDER/report.html.

examples:
  python -m experiments sweep output_dir=sweeps/lr optimizer=adamw,muon optimizer.lr=1e-3,2e-3,4e-3 seed=1,2
  python -m experiments sweep output_dir=sweeps/solvers optimizer=dash solver=eigen,newton_db,minimax
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
    status = through_hydra("train", train.run, [*words, "--multirun"])
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
