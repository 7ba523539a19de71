"""``python -m experiments classify``: a small convnet on images, on one process or several."""

import time
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional

from experiments.builders import build, build_learning_rate, build_optimizer, parameter_groups
from experiments.composition import optimizer_name, plain
from experiments.environment import environment
from experiments.images import Images, SmallConvNet
from experiments.metrics import FILE_NAME, MetricsFile
from experiments.parallel import Process, parallelise, process_group
from experiments.settings import SettingsError


def run(config: DictConfig) -> int:
    """Train and validate.

    Args:
        config: The composed settings.

    Returns:
        Exit status, as of `experiments.main.main`.
    """
    with process_group(config.parallelism, config.device) as process:
        if config.batch_size % process.world_size:
            raise SettingsError(
                f"batch_size={config.batch_size} must be a multiple of the number of processes, "
                f"{process.world_size}."
            )
        images: Images = build(config.images, "images").to(process.device)
        log = _open_log(config, process, images)
        try:
            return _train(config, process, images, log)
        finally:
            if log is not None:
                log.close()


def _open_log(config: DictConfig, process: Process, images: Images) -> MetricsFile | None:
    if config.output_dir is None or not process.is_first:
        return None
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = MetricsFile(folder / FILE_NAME)
    except OSError as error:
        raise SettingsError(f"output_dir={folder} can't be made: {error.strerror}.") from error
    known = environment(process.device, process.world_size)
    log.write("start", **known, images=images.name, config=plain(config))
    return log


def _train(config: DictConfig, process: Process, images: Images, log: MetricsFile | None) -> int:
    torch.manual_seed(config.seed)
    model = SmallConvNet(images, config.channels, config.bias).to(process.device)
    wrapped, distributed_config = parallelise(model, config.parallelism, process)
    groups = parameter_groups(model, config.parameter_groups)  # sharding makes other parameters
    optimizer = build_optimizer(config.optimizer, groups, distributed_config)
    num_batches = -(-len(images.labels) // config.batch_size)
    num_steps = config.epochs * num_batches
    schedule = build_learning_rate(config.schedule, optimizer, num_steps)
    if process.is_first:
        size = sum(p.numel() for p in model.parameters())
        print(f"{images.name}, {size:,} parameters, {optimizer_name(config)}")
    step, seconds = 0, 0.0
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        order = torch.Generator().manual_seed(config.seed + epoch)
        total = torch.zeros((), device=process.device)
        places = torch.randperm(len(images.labels), generator=order)
        for batch in torch.split(places, config.batch_size):
            own = batch[process.rank :: process.world_size].to(process.device)
            if len(batch) < process.world_size:
                continue  # too few for everyone to have one
            schedule.apply(step)
            optimizer.zero_grad()
            loss = functional.cross_entropy(wrapped(images.inputs[own]), images.labels[own])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(batch)
            step += 1
        mean = float(process.mean(total)) / len(images.labels)
        seconds += time.perf_counter() - started
        validation_loss, accuracy = _validate(wrapped, images)
        if process.is_first:
            print(
                f"epoch {epoch}: training loss {mean:.4f}, validation loss {validation_loss:.4f}, "
                f"accuracy {accuracy:.1%}, {seconds:.1f} s"
            )
        if log is not None:
            log.write(
                "epoch",
                epoch=epoch,
                step=step,
                loss=mean,
                validation_loss=validation_loss,
                accuracy=accuracy,
                seconds=seconds,
            )
    return 0


@torch.no_grad()
def _validate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Mean loss and accuracy; every process computes them, since a sharded model needs all."""
    model.eval()
    parts: list[Tensor] = [model(part) for part in torch.split(images.validation_inputs, 1024)]
    model.train()
    scores, labels = torch.cat(parts), images.validation_labels
    accuracy = (scores.argmax(1) == labels).float().mean()
    return float(functional.cross_entropy(scores, labels)), float(accuracy)
