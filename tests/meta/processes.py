"""Runs a function in several processes that talk over gloo on the loopback device."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import CONTEXT


def run_in_processes(
    function: Callable[..., Any], num_processes: int, folder: Path, *args: Any
) -> list[Any]:
    """What `function(*args)` returned in each process, by rank."""
    mp.start_processes(
        _work,
        (num_processes, folder, function, args),
        nprocs=num_processes,
        start_method=CONTEXT.get_start_method(),
    )
    return [
        torch.load(folder / f"result_{rank}.pt", weights_only=False)
        for rank in range(num_processes)
    ]


def _work(
    rank: int,
    num_processes: int,
    folder: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes
    )
    try:
        torch.save(function(*args), folder / f"result_{rank}.pt")
    finally:
        dist.destroy_process_group()
