"""The command line of the study."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from experiments.command_line import Parser
from experiments.settings import SettingsError
from experiments.study import answers
from experiments.study.questions import QUESTIONS, TASKS
from experiments.study.runs import Store, result
from experiments.study.sides import Side


def main(words: Sequence[str]) -> int:
    """Carry out ``study``.

    Args:
        words: The command line after ``study``.

    Returns:
        Exit status, as of `experiments.main.main`.

    Raises:
        SettingsError: If a question, a task or a seed is not one.
    """
    parser = Parser(
        prog="python -m experiments study",
        description="Trains small models with many optimizers and settings, each at its own learning "
        "rate, and writes a page of tables and pictures. Runs that were done are not done again, so "
        "that the same command goes on after a stop.",
    )
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--sides", nargs="+", help="those alone whose names contain one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--tuning-seeds",
        nargs="+",
        type=int,
        default=[0],
        help="their mean loss chooses the learning rate; none of the seeds",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("studies"))
    parser.add_argument(
        "--only-report", action="store_true", help="write the page from the runs that are there"
    )
    args = parser.parse_args(words)
    _check("question", args.questions, list(QUESTIONS))
    _check("task", args.tasks, list(TASKS))
    for word in args.sides or []:
        if not any(word in label for q in QUESTIONS.values() for label in q.sides):
            raise SettingsError(f"no side's name contains {word!r}.")
    if shared := sorted({*args.tuning_seeds} & {*args.seeds}):
        raise SettingsError(f"--tuning-seeds {shared[0]} must not be one of --seeds.")
    # Processor time is compared: threads that wait for each other would add to it.
    torch.set_num_threads(1)
    for name in ("dash_shampoo", "distributed_shampoo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    store = Store(args.output_dir / "runs.jsonl")
    if not args.only_report:
        for task in args.tasks:
            for name in args.questions or QUESTIONS:
                if task in QUESTIONS[name].tasks:
                    sides = _sides(name, args.sides)
                    _ask(store, name, task, sides, args.seeds, args.tuning_seeds)
    print(answers.write(store, args.output_dir, args.seeds, args.tuning_seeds))
    return 0


def _sides(name: str, words: Sequence[str] | None) -> dict[str, Side]:
    return {
        label: side
        for label, side in QUESTIONS[name].sides.items()
        if words is None or any(word in label for word in words)
    }


def _ask(
    store: Store,
    name: str,
    task: str,
    sides: Mapping[str, Side],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
) -> None:
    for label, side in sides.items():
        try:
            one = result(store, task, label, side, seeds, tuning_seeds)
        except NotImplementedError as error:
            print(f"{name} {task} {label} is left out: {str(error).split(',')[0]}", flush=True)
            continue
        print(
            f"{name} {task} {label}: {one.mean:.4f} ± {one.deviation:.4f} "
            f"(lr {one.lr:g}, {one.seconds:.1f} s)",
            flush=True,
        )


def _check(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for word in given:
        if word not in known:
            raise SettingsError(f"unknown {what} {word!r}; one of {', '.join(known)}.")
