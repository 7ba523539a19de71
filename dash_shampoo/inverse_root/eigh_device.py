"""Where eigendecompositions of a stack that is on CUDA are fastest: a measured table.

On CUDA `torch.linalg.eigh` chooses among the routines of cuSOLVER by size and number itself, and has no
argument for it. What is left to choose is its rival, LAPACK on the CPU, where cuSOLVER loops over matrices.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("eigh_devices.json")
"""By device: up to which N, and from how many matrices on, the CPU is faster. `tools/tune.py` measures."""


@lru_cache(maxsize=1)
def _rows() -> dict[str, list[list[int]]]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table["on_the_cpu"]  # type: ignore[no-any-return]


def is_faster_on_the_cpu(device: str, num_blocks: int, size: int) -> bool:
    """Whether the table says so.

    Args:
        device: Such as "sm_90".
        num_blocks: B.
        size: N.

    Returns:
        False for a device that was not measured.

    Examples:
        >>> is_faster_on_the_cpu("sm_1", 8, 64)
        False
    """
    rows = _rows().get(device, [])
    return any(size <= largest and num_blocks >= fewest for largest, fewest in rows)


def eigh_device(A: Tensor, offload_device: str | None) -> torch.device:
    """Where a stack is decomposed.

    Args:
        A: (B, N, N) stack.
        offload_device: What the user's config asks for; it decides. "" and None ask for nothing.

    Returns:
        The device.
    """
    if offload_device:
        return torch.device(offload_device)
    # A device that is only pretended has no capability, so it is asked for where it matters.
    if A.is_cuda and any(_rows().values()):
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(A.device))
        if is_faster_on_the_cpu(name, A.shape[0], A.shape[-1]):
            return torch.device("cpu")
    return A.device
