"""Processes that come from a fork server, which has imported what importing anew would take seconds in each.

They listen on the loopback interface alone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

TIMEOUT = 240.0

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def run_apart(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a function returns in a process of its own; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(function, *args, **options).result(TIMEOUT)


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    status: int | None
    out: str
    error: str


def run_to_their_end(processes: Sequence[BaseProcess], timeout: float) -> None:
    """Starts processes and waits for them; one that doesn't end within the seconds is killed."""
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def free_port() -> int:
    """Of the loopback interface."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_experiments(world_size: int, words: Sequence[str], folder: Path) -> list[Ended]:
    """Runs `python -m experiments` in several processes, with the environment that torchrun gives.

    Args:
        world_size: The number of processes.
        words: The command and its settings.
        folder: For what they print.

    Returns:
        How each ended, by rank; one that doesn't end in time is killed.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes, files = [], []
    for rank in range(world_size):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        files.append([folder / f"{name}_{rank}.txt" for name in ("out", "error")])
        processes.append(CONTEXT.Process(target=_experiments, args=(list(words), own, files[-1])))
    run_to_their_end(processes, TIMEOUT)
    return [
        Ended(process.exitcode, *(path.read_text() for path in paths))
        for process, paths in zip(processes, files, strict=True)
    ]


def _experiments(words: list[str], environment: dict[str, str], files: list[Path]) -> None:
    from experiments.main import main
    from experiments.parallel import leave

    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), files, strict=True):
        with path.open("w") as file:
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    logging.getLogger("dash_shampoo").setLevel(logging.NOTSET)  # which the server's modules set
    torch.set_num_threads(1)
    leave(main(words))
