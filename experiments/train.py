"""``python -m experiments train``."""

import contextlib
import fcntl
import itertools
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from experiments.composition import choice, optimizer_name, overrides
from experiments.main import fail
from experiments.parallel import Process, process_group
from experiments.runs import read_run
from experiments.settings import Resume, SettingsError
from experiments.trainer import RunError, Trainer, TrainResult


def run(config: DictConfig) -> int:
    """Train.

    Args:
        config: The composed settings.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    with process_group(config.parallelism, config.device) as process:
        output_dir = Path(process.from_first(str(_output_dir(config, process))))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with contextlib.ExitStack() as claims:
                is_ours = not process.is_first or claims.enter_context(_claim(output_dir))
                if reason := _left_out(config, process, output_dir, is_ours):
                    if process.is_first:
                        print(f"{reason}: {output_dir}", flush=True)
                    return 0
                return _train(config, process, output_dir)
        return _train(config, process, output_dir)


@contextlib.contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Whether this process, of several that go through the same sweep, has the run of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "running.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _left_out(config: DictConfig, process: Process, folder: Path, is_ours: bool) -> str:
    """Why a run of a sweep is not this process's to do, or ""; the same on all ranks."""
    if process.any(not is_ours):
        return "another worker is at it"
    run_before = read_run(folder) if config.resume != Resume.never else None
    return "already done" if run_before is not None and run_before.is_done else ""


def _train(config: DictConfig, process: Process, output_dir: Path) -> int:
    trainer = Trainer(config, process, output_dir, optimizer_name(config))
    if process.is_first:
        changed = "".join(f"  {k}: {a} -> {b}\n" for k, (a, b) in trainer.changed_settings.items())
        if changed:
            print(f"set otherwise than in {trainer.last_checkpoint}:\n{changed}", end="")
        (output_dir / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
        print(
            f"{trainer.num_parameters:,} parameters, {trainer.data.train.numel():,} training "
            f"tokens ({trainer.data.name}), from step {trainer.step} to {trainer.last_step}, "
            f"into {output_dir}"
        )
        print("\n".join(describe_groups(trainer.optimizer)))
    try:
        result = trainer.run()
    except RunError as error:
        return fail(str(error), 1)
    finally:
        trainer.close()
    if process.is_first:
        _tell(result, output_dir)
    return 0 if result.signal_number is None else 128 + result.signal_number


def _output_dir(config: DictConfig, process: Process) -> Path:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return Path(hydra.runtime.output_dir)
    if config.output_dir is not None:
        return Path(config.output_dir)
    stem = f"{choice('model')}_{choice('optimizer')}_{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path("outputs") / (stem if number == 1 else f"{stem}_{number}")
        try:
            if process.is_first:
                folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue  # another run was started in the same second
        except OSError as error:
            raise SettingsError(
                f"{folder} can't be made: {error.strerror}; give output_dir."
            ) from error
    return folder


def describe_groups(optimizer: Optimizer) -> list[str]:
    """What went into which parameter group.

    Args:
        optimizer: Its groups know the names of their parameters.

    Returns:
        One line per group; names that differ in the number of a layer are one.
    """
    lines = []
    for number, group in enumerate(optimizer.param_groups):
        kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in group.get("param_names", ()))
        names = ", ".join(
            f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()
        )
        size = sum(p.numel() for p in group["params"])
        lines.append(f"  group {number}, {size:,} scalars, lr {group['lr']:g}: {names}")
    return lines


def _tell(result: TrainResult, output_dir: Path) -> None:
    if result.signal_number is None:
        print(
            f"validation loss {result.validation_loss:.4f} after {result.step} steps and "
            f"{result.seconds:.1f} s; metrics and checkpoint in {output_dir}"
        )
        return
    print(
        f"Stopped after step {result.step}; the checkpoint is {result.checkpoint}. "
        f"Continue with:\n  {shlex.join(_command_again(output_dir))}",
        file=sys.stderr,
    )


def _command_again(output_dir: Path) -> list[str]:
    """The command that was run, torchrun's part of it too, with the folder that it chose."""
    command = ["python", "-m", "experiments", "train"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        command = _torchrun_words() or ["torchrun", *_torchrun_numbers(), *command[1:]]
    kept = [word for word in overrides() if not word.startswith(("output_dir=", "resume="))]
    return [*command, *kept, f"output_dir={output_dir}"]


def _torchrun_words() -> list[str]:
    """What torchrun, which is our parent, was called with, up to our own settings."""
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8")
        words = line.rstrip("\0").split("\0")
        return words[: words.index("train", words.index("experiments")) + 1]
    except (OSError, ValueError):
        return []


def _torchrun_numbers() -> list[str]:
    processes = os.environ["LOCAL_WORLD_SIZE"]
    nodes = int(os.environ["WORLD_SIZE"]) // int(processes)
    return ["--nnodes", str(nodes), "--nproc-per-node", processes]
