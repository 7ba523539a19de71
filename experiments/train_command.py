"""The subcommand ``python -m experiments train``: words in, exit status out."""

import argparse
import logging
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.main import fail
from experiments.parallel import process_group
from experiments.settings import (
    TRAIN_GROUPS,
    SettingsError,
    TrainSettings,
    compose_train,
    config_dir,
    options,
    train_settings,
)
from experiments.train import DivergedError, Trainer, TrainResult

_EXAMPLES = """\
examples:
  python -m experiments train optimizer=dash_newton_db model=tiny data=stdlib_bytes steps=200
  python -m experiments train optimizer=adamw optimizer.lr=3e-3 output_dir=runs/adamw
  python -m experiments train optimizer=dash_eigen --cfg job
  torchrun --nproc-per-node 2 -m experiments train parallelism=fully_shard
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the words after ``python -m experiments train``.

    Returns:
        The parser; its help lists the groups and the settings.
    """
    result = argparse.ArgumentParser(
        prog="python -m experiments train",
        description="Train a Llama-style model. Settings come from YAML files and are changed by "
        "words such as optimizer=adamw (choose a file) or optimizer.lr=1e-3 (change a value).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_epilog(),
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    result.add_argument(
        "--cfg", choices=["job"], help="print the composed configuration instead of training"
    )
    result.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder with YAML files of your own"
    )
    return result


def _epilog() -> str:
    groups = "\n".join(
        textwrap.fill(
            f"{name:<17}" + ", ".join(options(name)),
            96,
            initial_indent="  ",
            subsequent_indent=" " * 19,
        )
        for name in TRAIN_GROUPS
    )
    text = (config_dir() / "train.yaml").read_text(encoding="utf-8")
    settings = textwrap.indent(text[text.index("\nsteps:") :].strip(), "  ")
    return f"{_EXAMPLES}\ngroups:\n{groups}\n\nsettings and their defaults:\n{settings}\n"


def run(words: Sequence[str]) -> int:
    """Carry out ``python -m experiments train``.

    Args:
        words: The command line after ``train``.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = parser().parse_intermixed_args(list(words))
        config = compose_train(arguments.overrides, arguments.config_dir)
        settings = train_settings(config)
        if arguments.cfg:
            print(OmegaConf.to_yaml(config, resolve=False), end="")
            return 0
        return _train(config, settings, words)
    except SettingsError as error:
        return fail(str(error), 2)
    except DivergedError as error:
        return fail(str(error), 1)


def _train(config: DictConfig, settings: TrainSettings, words: Sequence[str]) -> int:
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    with process_group(config.parallelism, settings.device) as process:
        output_dir = Path(process.from_first(settings.output_dir or _fresh_name(config)))
        output_dir.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, settings, process, output_dir)
        if process.is_first:
            (output_dir / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
            print(
                f"{trainer.num_parameters:,} parameters, {trainer.data.train.numel():,} training "
                f"tokens ({trainer.data.name}), from step {trainer.step} to {settings.steps}, "
                f"into {output_dir}"
            )
        try:
            result = trainer.run()
        finally:
            trainer.close()
        if process.is_first:
            _tell(result, output_dir, words)
    return 0 if result.signal_number is None else 128 + result.signal_number


def _fresh_name(config: DictConfig) -> str:
    choices = config.choices
    moment = time.strftime("%Y%m%d-%H%M%S")
    return f"outputs/{choices.model}_{choices.optimizer}_{moment}"


def _tell(result: TrainResult, output_dir: Path, words: Sequence[str]) -> None:
    if result.signal_number is None:
        print(
            f"validation loss {result.validation_loss:.4f} after {result.step} steps and "
            f"{result.seconds:.1f} s; metrics and checkpoint in {output_dir}"
        )
        return
    kept = [word for word in words if not word.startswith(("output_dir=", "resume="))]
    command = shlex.join(
        ["python", "-m", "experiments", "train", *kept, f"output_dir={output_dir}"]
    )
    print(
        f"Stopped after step {result.step}; the checkpoint is {result.checkpoint}. "
        f"Continue with:\n  {command}",
        file=sys.stderr,
    )
