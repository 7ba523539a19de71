"""``python -m experiments``: which command, with which words."""

import argparse
import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

# Command: what it does. Each is a module of this package with `run(config) -> exit status`, and a
# file of its name in configs/; or with `main(words) -> exit status`, where files are what it takes.
COMMANDS = {
    "train": "train a Llama-style model",
    "classify": "train a small convnet on images",
    "study": "which optimizer and settings train best, on small tasks",
    "sweep": "train with many settings: best first, and a page",
    "plan": "memory, work and balance on many ranks, before running",
    "paper": "the paper's grid of trainings, and its step times beside ours",
    "bench": "time of an optimizer's step, by phase, on one rank or on many",
    "demo": "compare optimizers on a tiny model: table and plots",
    "report": "one page about any number of runs",
    "data": "token files from text or from Hugging Face",
    "from-dash": "a run of the DASH repository as a run of ours",
    "from-meta": "a run of Distributed Shampoo's CIFAR-10 example as a run of ours",
}
# What the extra `dev` brings.
_EXTRA = (
    "hydra",
    "omegaconf",
    "tqdm",
    "matplotlib",
    "sentencepiece",
    "plotly",
    "sklearn",
    "mnist1d",
)
# Of Hydra's command line; for anything else it would print a page.
_FLAGS = (
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package"),
    *("-r", "--run", "-m", "--multirun", "-sc", "--shell-completion", "-cp", "--config-path"),
    *("-cn", "--config-name", "-cd", "--config-dir", "--experimental-rerun", "-i", "--info"),
)
# What is not in it: some gigabytes less.
_ON_DEMAND = ("datasets", "huggingface_hub")


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: The command line after the program's name; None takes it from ``sys.argv``.

    Returns:
        Exit status: 0, 1 for a run that failed, 2 for a mistake in the command or its settings,
        128 + n for a run that signal n stopped (130 for Ctrl-C).
    """
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        return fail(f"{words[0]!r} comes before a command; one of {', '.join(COMMANDS)}.", 2)
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Train with dash_shampoo, compare optimizers, plan for many ranks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
        + "\n\n`python -m experiments COMMAND --help` tells more.",
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(words[:1]).command
    if command is None:
        parser.print_help()
        return 0
    if command not in COMMANDS:
        return fail(f"unknown command {command!r}; one of {', '.join(COMMANDS)}.", 2)
    try:
        module = importlib.import_module(f"experiments.{command.replace('-', '_')}")
        if hasattr(module, "main"):
            return _directly(module.main, words[1:])
        return through_hydra(command, module.run, words[1:])
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _ON_DEMAND:
            return fail(f"the module {missing} is missing: pip install -e '.[data]'", 2)
        if missing not in _EXTRA:
            raise
        return fail(f"the module {missing} is missing: pip install -e '.[dev]'", 2)


def through_hydra(command: str, run: Callable[..., int], words: Sequence[str]) -> int:
    """Have Hydra compose the settings and call a command with them.

    Args:
        command: Its file in configs/.
        run: The command; takes the settings and returns an exit status.
        words: The command line: overrides, and flags of Hydra's.

    Returns:
        The exit status; of several runs the largest.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from experiments import composition, settings

    statuses: list[int] = []

    def job(config: DictConfig) -> None:
        """One run; with --multirun there are several, and one that fails leaves the others be."""
        try:
            settings.check(config)
            if config.get("num_threads") is not None:
                torch.set_num_threads(config.num_threads)
            statuses.append(run(config))
        except settings.SettingsError as error:
            statuses.append(fail(str(error), 2))
        except OmegaConfBaseException as error:
            statuses.append(fail(composition.one_sentence(error), 2))
        if statuses[-1] >= 128:
            sys.exit(statuses[-1])

    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if odd := [flag for flag in flags if flag not in _FLAGS]:
        near = difflib.get_close_matches(odd[0], _FLAGS, n=1, cutoff=0.75)
        hint = f" Did you mean {near[0]}?" if near else " Settings are given as KEY=VALUE."
        return fail(f"{command} has no option {odd[0]}.{hint}", 2)
    settings.register()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    start = hydra.main(version_base="1.3", config_path=str(settings.CONFIGS), config_name=command)
    # Errors come to us whole, instead of Hydra's printing them and ending the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    own_words = sys.argv
    try:
        sys.argv = [f"experiments {command}", *_with_names(words)]
        start(job)()
    except (HydraException, OmegaConfBaseException) as error:
        return fail(composition.one_sentence(error), 2)
    except ValueError as error:
        if statuses or not _is_of_hydra(error):
            raise
        return fail(f"{error}.", 2)
    finally:
        sys.argv = own_words
    return max(statuses, default=0)


def _is_of_hydra(error: ValueError) -> bool:
    """Whether it was raised while the settings were composed: `model=null`, say."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return str(last[0].f_globals.get("__name__", "")).startswith("hydra.")


def _directly(run: Callable[..., int], words: Sequence[str]) -> int:
    from experiments.settings import SettingsError

    try:
        return run(words)
    except SettingsError as error:
        return fail(str(error), 2)


def _with_names(words: Sequence[str]) -> list[str]:
    """Has each of several runs named by what distinguishes it, not by all that was set."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    settings = [word for word in words if word[0] != "-" and "=" in word]
    if not settings or not {"-m", "--multirun"} & set(words):
        return list(words)
    parsed = OverridesParser.create().parse_overrides(settings)
    common = ",".join(o.key_or_group for o in parsed if not o.is_sweep_override())
    place = words.index(settings[0])
    naming = f"hydra.job.config.override_dirname.exclude_keys=[{common}]"
    return [*words[:place], naming, *words[place:]]


def fail(message: str, status: int) -> int:
    """Print an error message.

    Args:
        message: What is wrong and what to do.
        status: The exit status.

    Returns:
        The exit status.
    """
    print(f"experiments: error: {message}", file=sys.stderr)
    return status
