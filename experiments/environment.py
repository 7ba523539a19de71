"""What machine and versions a result comes from."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import dash_shampoo
from dash_shampoo.planning import DEVICES
from experiments.parallel import Process
from experiments.settings import Precision

_BASE = dash_shampoo.DistributedShampoo.__module__


def environment(device: torch.device | str = "cpu", world_size: int = 1) -> dict[str, Any]:
    """Versions and hardware, for the first record of a metrics file and the head of a report.

    Args:
        device: Where it was computed.
        world_size: Number of processes.

    Returns:
        Plain values.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    return {
        "dash_shampoo": dash_shampoo.__version__,
        "base": "embedded" if _BASE.startswith("dash_shampoo.") else "meta",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_cuda else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def peak_flops(config: DictConfig, process: Process) -> float | None:
    """The rate that the share of peak (MFU) of all processes together is taken of.

    Args:
        config: The composed settings of ``train``.
        process: This process.

    Returns:
        FLOP/s in the precision of the model's products; None for a device whose peak is not known.
    """
    peak: float | None = None
    if config.peak_tflops is not None:
        peak = config.peak_tflops * 1e12
    elif process.device.type == "cuda":
        name = torch.cuda.get_device_name(process.device)
        known = next((device for key, device in DEVICES.items() if key in name), None)
        fp32 = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
        precision = fp32 if config.precision == Precision.fp32 else config.precision.name
        peak = known.peak_flops[precision] if known else None
    return None if peak is None else peak * process.world_size


def processor() -> str:
    """Name of the CPU, such as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
