"""Runs a function in several processes that form a process group; they find each other through a file."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta

import torch

from tests.processes import CONTEXT, run_to_their_end

TIMEOUT = 120.0


def run(world_size, worker, directory, *args):
    """Calls `worker(rank, *args)` in every process.

    Returns:
        What the workers returned, by rank.

    Raises:
        AssertionError: If one raised or did not end in time, with its traceback.
    """
    # A directory may serve several runs of a test, each with files of its own.
    directory = directory / f"run{len(list(directory.iterdir()))}"
    directory.mkdir()
    processes = [
        CONTEXT.Process(target=_main, args=(rank, world_size, worker, str(directory), args))
        for rank in range(world_size)
    ]
    run_to_their_end(processes, TIMEOUT)
    errors = sorted(directory.glob("error*"))
    assert not errors, "\n".join(f"{error.name}:\n{error.read_text()}" for error in errors)
    results = [directory / f"result{rank}" for rank in range(world_size)]
    missing = [result.name for result in results if not result.exists()]
    assert not missing, f"no {missing} in {TIMEOUT} s"
    return [torch.load(result, weights_only=False) for result in results]


def _main(rank, world_size, worker, directory, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(f"{directory}/store", world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        result = worker(rank, *args)
        torch.save(result, f"{directory}/result{rank}")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        with open(f"{directory}/error{rank}", "w") as file:
            traceback.print_exc(file=file)
        # A process that waits for this one is not to be waited for.
        os._exit(1)
