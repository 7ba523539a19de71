"""``python -m experiments train``."""

import shlex
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.main import fail
from experiments.parallel import process_group
from experiments.settings import choice, overrides
from experiments.trainer import DivergedError, Trainer, TrainResult


def run(config: DictConfig) -> int:
    """Train.

    Args:
        config: The composed settings.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    with process_group(config.parallelism, config.device) as process:
        output_dir = Path(process.from_first(_output_dir(config)))
        output_dir.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, process, output_dir)
        if process.is_first:
            (output_dir / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
            print(
                f"{trainer.num_parameters:,} parameters, {trainer.data.train.numel():,} training "
                f"tokens ({trainer.data.name}), from step {trainer.step} to {config.steps}, "
                f"into {output_dir}"
            )
        try:
            result = trainer.run()
        except DivergedError as error:
            return fail(str(error), 1)
        finally:
            trainer.close()
        if process.is_first:
            _tell(result, output_dir)
    return 0 if result.signal_number is None else 128 + result.signal_number


def _output_dir(config: DictConfig) -> str:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return str(hydra.runtime.output_dir)
    if config.output_dir is not None:
        return str(config.output_dir)
    moment = time.strftime("%Y%m%d-%H%M%S")
    return f"outputs/{choice('model')}_{choice('optimizer')}_{moment}"


def _tell(result: TrainResult, output_dir: Path) -> None:
    if result.signal_number is None:
        print(
            f"validation loss {result.validation_loss:.4f} after {result.step} steps and "
            f"{result.seconds:.1f} s; metrics and checkpoint in {output_dir}"
        )
        return
    kept = [word for word in overrides() if not word.startswith(("output_dir=", "resume="))]
    command = shlex.join(
        ["python", "-m", "experiments", "train", *kept, f"output_dir={output_dir}"]
    )
    print(
        f"Stopped after step {result.step}; the checkpoint is {result.checkpoint}. "
        f"Continue with:\n  {command}",
        file=sys.stderr,
    )
