"""Thousands of steps: memory and time of a step stay what they were, state stays bound to its stacks.

A small model's parameters take steps on random gradients; roots are refreshed every 10 steps, a third of
the parameters misses its gradient now and then, and at the end of every window the state goes out and in
again through `state_dict`. Fails if a window ends with more tensors, bytes of tensors or Python objects than
the second, if resident memory or the time of a step grows, or if a state tensor has moved or no longer
takes part in the step.

    python benchmarks/soak.py                 # 20,000 steps, some minutes
    python benchmarks/soak.py --steps 400 --windows 4
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from benchmarks.cases import Case, make_gradients, make_parameters, set_gradients
from benchmarks.ours import CONFIGS

CASE = Case("soak", [((48, 32), 4), ((32, 32), 4), ((32, 24), 2), ((32,), 5)], 16)
NUM_GRADIENTS = 8
REFRESH_EVERY = 10


@dataclass(frozen=True)
class Window:
    """What was found at the end of a window.

    Attributes:
        milliseconds (float): Processor time of a step, the least of the window's tenths.
        resident (int): Bytes of memory that the process holds; 0 where the system does not tell.
        tensors (int): Tensors that are alive.
        tensor_bytes (int): The bytes of their storages.
        objects (int): Python objects that the garbage collector knows.
    """

    milliseconds: float
    resident: int
    tensors: int
    tensor_bytes: int
    objects: int


def take_stock(milliseconds: float, own_objects: int) -> Window:
    """Counts what is alive, but for so many objects."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [entry for entry in objects if type(entry) in (Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pages = 0
    counts = len(tensors), sum(storages.values()), len(objects) - own_objects
    return Window(milliseconds, pages * 4096, *counts)


def state_tensors(
    node: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors of an optimizer's state, with the keys that lead to them."""
    if isinstance(node, Tensor):
        yield path, node
        return
    if hasattr(node, "__dict__") and not isinstance(node, dict):
        node = vars(node)
    items = node.items() if isinstance(node, dict) else enumerate(node)
    if isinstance(node, (dict, list, tuple)):
        for key, value in items:
            if isinstance(value, (Tensor, dict, list, tuple)) or hasattr(value, "__dict__"):
                yield from state_tensors(value, (*path, key))


class Soak:
    """The optimizer and its gradients.

    Args:
        config: The preconditioner's config.
    """

    def __init__(self, config: ds.PreconditionerConfig) -> None:
        values = make_parameters(CASE, "cpu")
        self._gradients = [make_gradients(values, seed) for seed in range(NUM_GRADIENTS)]
        self._parameters = [torch.nn.Parameter(value) for value in values]
        self.optimizer = ds.DashShampoo(
            self._parameters,
            lr=1e-4,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            max_preconditioner_dim=CASE.block,
            precondition_frequency=REFRESH_EVERY,
            grafting_config=ds.AdamPreconditionerConfig(beta2=0.95),
            preconditioner_config=config,
        )
        self._number = 0

    def step(self) -> None:
        """One step, in some of which a third of the parameters has no gradient."""
        set_gradients(self._parameters, self._gradients[self._number % NUM_GRADIENTS])
        if self._number % 7 == 3:
            for parameter in self._parameters[self._number % 3 :: 3]:
                parameter.grad = None
        self._number += 1
        self.optimizer.step()

    def run(self, steps: int) -> float:
        """Takes steps, and returns the least processor time of a step, in milliseconds."""
        times = []
        for _ in range(10):
            start = time.process_time()
            for _ in range(steps // 10):
                self.step()
            times.append((time.process_time() - start) * 1e3 / (steps // 10))
        return min(times)

    def addresses(self) -> dict[tuple[Any, ...], int]:
        """Where the tensors of the state lie."""
        tensors = state_tensors([self.optimizer.state[p] for p in self._parameters])
        return {path: tensor.data_ptr() for path, tensor in tensors}

    def reload(self) -> None:
        """The state out of the optimizer and in again."""
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def unbound(self) -> list[tuple[Any, ...]]:
        """The state tensors that the steps until the next refresh leave as they were."""
        states = [self.optimizer.state[p] for p in self._parameters]
        before = {path: tensor.clone() for path, tensor in state_tensors(states)}
        for _ in range(REFRESH_EVERY):
            set_gradients(self._parameters, self._gradients[self._number % NUM_GRADIENTS])
            self._number += 1
            self.optimizer.step()
        return [path for path, tensor in state_tensors(states) if tensor.equal(before[path])]


def complaints(
    windows: Sequence[Window], moved: Sequence[Any], unbound: Sequence[Any]
) -> list[str]:
    """What is not as it should be.

    Args:
        windows: At least three; the first one may still allocate.
        moved: State tensors that lie elsewhere than in the beginning.
        unbound: State tensors that take no part in the step.

    Returns:
        Sentences.
    """
    second, last = windows[1], windows[-1]
    found = [
        f"{name}: {getattr(second, name)} at the end of the second window, {max(values)} later"
        for name in ("tensors", "tensor_bytes", "objects")
        if max(values := [getattr(w, name) for w in windows[2:]]) > getattr(second, name)
    ]
    # The allocator may keep a few pages more.
    if last.resident > second.resident + 2**23:
        found.append(f"resident memory grew from {second.resident} to {last.resident} bytes")
    found += [f"state tensor {path} has moved" for path in moved]
    found += [f"state tensor {path} is not changed by steps" for path in unbound]
    return found


def slowdown(windows: Sequence[Window]) -> list[str]:
    """Whether steps have become slower: a sentence, or none."""
    half = len(windows) // 2
    early, late = (min(w.milliseconds for w in part) for part in (windows[:half], windows[half:]))
    if late <= 1.25 * early:
        return []
    return [f"a step took {early:.2f} ms in the first half, {late:.2f} ms in the second"]


def soak(name: str, steps: int, num_windows: int) -> tuple[list[Window], list[str]]:
    """Runs the steps of one config.

    Args:
        name: Key of `CONFIGS`.
        steps: Number of steps.
        num_windows: In how many windows.

    Returns:
        The windows, and the complaints.
    """
    run = Soak(CONFIGS[name].make())
    run.step()
    addresses = run.addresses()
    windows: list[Window] = []
    for _ in range(num_windows):
        milliseconds = run.run(steps // num_windows)
        run.reload()
        windows.append(take_stock(milliseconds, own_objects=len(windows)))
    moved = [path for path, address in run.addresses().items() if address != addresses[path]]
    return windows, complaints(windows, moved, run.unbound())


def main(words: Sequence[str]) -> int:
    """Prints a table for every config, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument(
        "--windows", type=int, default=20, help="at least 3, of at least 10 steps each"
    )
    parser.add_argument(
        "--configs", nargs="+", choices=list(CONFIGS), default=["default", "newton_db"]
    )
    options = parser.parse_args(words)
    if options.windows < 3 or options.steps < 10 * options.windows:
        parser.error(f"--steps {options.steps} --windows {options.windows}: too few")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    status = 0
    for name in options.configs:
        windows, found = soak(name, options.steps, options.windows)
        found += slowdown(windows)
        print(f"{name}, {options.steps} steps, base {ds.base.name}, torch {torch.__version__}\n")
        print(
            "| step, ms | resident, MiB | tensors | of bytes | objects |\n|---:|---:|---:|---:|---:|"
        )
        for w in windows:
            cells = f"{w.milliseconds:.2f}", f"{w.resident / 2**20:.1f}"
            print(f"| {' | '.join(cells)} | {w.tensors} | {w.tensor_bytes} | {w.objects} |")
        print("\n".join(found or ["flat"]), end="\n\n")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
