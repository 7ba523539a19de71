"""``python -m experiments paper``: the paper's grid of trainings, and its table of step times beside ours.

{Distributed Shampoo, layer-wise stacks, whole stacks} × block {1024, 2048} × six settings of the solver
× three seeds (arXiv 2602.02016): 108 trainings of the 953M model. Any setting of ``train`` may follow,
such as a smaller model and other data.
"""

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import bench, train
from experiments.command_line import Parser, positive
from experiments.main import fail, through_hydra
from experiments.report import write
from experiments.runs import Run, experiments, find_runs, read_run
from experiments.settings import SettingsError
from experiments.tables import markdown_table, spread

_LISTS = {
    "base": ["optimizer=distributed_shampoo"],
    "layer_wise": ["optimizer=dash", "parameter_groups=by_parameter"],
    "whole": ["optimizer=dash"],
}
_BLOCKS = (1024, 2048)
_SEEDS = (42, 666, 2408)
_SETTINGS = {
    "evd_1": ["solver=eigen", "solver.precondition_frequency=1"],
    "evd_10": ["solver=eigen", "solver.precondition_frequency=10"],
    "cn_fp32": ["solver=coupled_newton"],
    "cn_fp16": ["solver=coupled_newton", "solver.config.matmul_precision=fp16"],
    "ndb_fp32": ["solver=newton_db"],
    "ndb_power_fp32": ["solver=newton_db_power"],
}
# What Distributed Shampoo's own list can compute; the paper had the others in a fork of it.
_OF_BASE = {**_SETTINGS, "cn_fp32": ["solver=plain_coupled_newton"]}
_LEFT_OUT = ("cn_fp16", "ndb_fp32", "ndb_power_fp32")
_EPILOG = """\
examples:
  python -m experiments paper --dry
  python -m experiments paper --out paper --processes 8 data.train='c4/chunk_*' data.validation=c4/val.bin
  python -m experiments paper --out small --blocks 64,128 --only whole,42 experiment=demo steps=100
  python -m experiments paper --times --device cuda
"""


@dataclass(frozen=True)
class Cell:
    """One training of the grid.

    Attributes:
        stacks: ``base``, ``layer_wise`` or ``whole``.
        block: Largest block.
        setting: Of the solver.
        seed: Of the weights and the data.
    """

    stacks: str
    block: int
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.stacks}_{self.block}_{self.setting}_seed{self.seed}"

    @property
    def is_possible(self) -> bool:
        """Whether the base has the solver."""
        return self.stacks != "base" or self.setting not in _LEFT_OUT

    @property
    def words(self) -> list[str]:
        """Settings of ``train``."""
        solver = (_OF_BASE if self.stacks == "base" else _SETTINGS)[self.setting]
        return [
            *_LISTS[self.stacks],
            *solver,
            f"optimizer.max_preconditioner_dim={self.block}",
            f"seed={self.seed}",
        ]


def main(words: Sequence[str]) -> int:
    """Carry out ``paper``.

    Args:
        words: The command line after ``paper``.

    Returns:
        Exit status, as of `experiments.main.main`.

    Raises:
        SettingsError: If a setting can't be used.
    """
    if "--times" in words:
        return bench.main(["--paper", *(word for word in words if word != "--times")])
    options, more = _parse(words)
    own = [] if any(w.startswith("experiment=") for w in more) else ["experiment=llama_953m"]
    cells = [cell for cell in _grid(options.blocks) if _is_wanted(cell, options.only)]
    if not cells:
        raise SettingsError(f"--only {' '.join(options.only)} leaves nothing of the grid.")
    print(_listing(cells, options.out))
    if options.dry:
        for cell in cells:
            if cell.is_possible:
                print(shlex.join(_command(cell, [*own, *more], options)))
        return 0
    statuses = [0]
    for cell in cells:
        run = read_run(options.out / cell.name)
        if not cell.is_possible or (run is not None and run.is_done):
            continue
        print(f"\n{cell.name}", flush=True)
        statuses.append(_train(cell, [*own, *more], options))
        if statuses[-1] == 2 or statuses[-1] >= 128:  # what is wrong with one is wrong with all
            return statuses[-1]
    runs = find_runs([options.out])
    if runs:
        print(f"\n{_results(cells, options.out)}")
        print(f"All of it: {write(experiments(runs), options.out / 'report.html')}")
    return max(statuses)


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="python -m experiments paper",
        description=(__doc__ or "").partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--dry", action="store_true", help="list the trainings and their commands")
    add(
        "--times", action="store_true", help="step times instead: `bench --paper`, with its options"
    )
    add("--out", type=Path, default=Path("paper"), help="folder of all trainings")
    add("--blocks", type=_numbers, default=list(_BLOCKS), metavar="B,B", help="largest blocks")
    add(
        "--only",
        type=_words,
        default=[],
        metavar="A,B",
        help="these lists, blocks, settings, seeds",
    )
    add("--processes", type=positive, default=1, help="devices of each training (torchrun, DDP)")
    options, more = parser.parse_known_args(words)
    if odd := [word for word in more if word.startswith("-") or "=" not in word]:
        raise SettingsError(f"{odd[0]!r} is neither an option of paper nor KEY=VALUE of train.")
    values = [*_LISTS, *_SETTINGS, *map(str, _SEEDS), *map(str, options.blocks)]
    for word in options.only:
        if word not in values:
            raise SettingsError(f"--only {word}: one of {', '.join(values)}.")
    return options, more


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [positive(word) for word in _words(text)]


def _grid(blocks: Sequence[int]) -> list[Cell]:
    return [Cell(*values) for values in itertools.product(_LISTS, blocks, _SETTINGS, _SEEDS)]


def _is_wanted(cell: Cell, only: Sequence[str]) -> bool:
    """Of several words about the same thing any, of different things all must hold."""
    values = (cell.stacks, str(cell.block), cell.setting, str(cell.seed))
    kinds = (
        _LISTS,
        {w for w in only if w.isdigit()} - set(map(str, _SEEDS)),
        _SETTINGS,
        map(str, _SEEDS),
    )
    for value, kind in zip(values, map(set, kinds), strict=True):
        wanted = kind & set(only)
        if wanted and value not in wanted:
            return False
    return True


def _command(cell: Cell, more: Sequence[str], options: argparse.Namespace) -> list[str]:
    command = ["python"]
    own = [*cell.words, *more, f"output_dir={options.out / cell.name}"]
    if options.processes > 1:
        command = ["torchrun", "--nproc-per-node", str(options.processes)]
        own.append("parallelism=ddp")
    return [*command, "-m", "experiments", "train", *own]


def _train(cell: Cell, more: Sequence[str], options: argparse.Namespace) -> int:
    command = _command(cell, more, options)
    if options.processes == 1:
        return through_hydra("train", train.run, command[command.index("train") + 1 :])
    command = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    try:
        done = subprocess.run(command, check=False, env=os.environ)
    except KeyboardInterrupt:
        return 130
    return done.returncode if done.returncode in (0, 1) else fail(f"{cell.name} was stopped.", 130)


def _state(cell: Cell, run: Run | None) -> str:
    if not cell.is_possible:
        return "left out: the base has no such solver"
    if run is None:
        return "to do"
    steps = [record["step"] for record in run.records if "step" in record]
    last = max(steps, default=0)
    return "done" if run.is_done else f"step {last} of {run.start['config']['steps']}"


def _listing(cells: Sequence[Cell], folder: Path) -> str:
    rows = [[cell.name, _state(cell, read_run(folder / cell.name))] for cell in cells]
    count = sum(cell.is_possible for cell in cells)
    return f"{markdown_table(['training', 'state'], rows)}\n{count} of {len(cells)} can be run."


def _results(cells: Sequence[Cell], folder: Path) -> str:
    """Mean and spread over the seeds, a column for each list."""
    rows = []
    for block, setting in dict.fromkeys((cell.block, cell.setting) for cell in cells):
        row = [f"{block}, {setting}"]
        for stacks in _LISTS:
            same = [c for c in cells if (c.stacks, c.block, c.setting) == (stacks, block, setting)]
            runs = [run for c in same if (run := read_run(folder / c.name)) is not None]
            losses = [
                run.of("validation")[-1]["loss"] for run in runs if run.is_done and not run.diverged
            ]
            row.append(spread(losses, "{:.4f}") or "–")
        rows.append(row)
    header = ["validation loss", "Distributed Shampoo", "layer-wise", "whole"]
    return markdown_table(header, rows)
