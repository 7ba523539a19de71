"""Meta's own tests of Distributed Shampoo, with DashShampoo in its place.

    PYTHONPATH=. python tests/meta/suite.py CHECKOUT [arguments of pytest]

`CHECKOUT` is a checkout of facebookresearch/optimizers; its files are neither changed nor copied. The name
`DistributedShampoo` is bound to `DashShampoo` before a test module is imported. The run fails if a test
fails, if nothing ran, or if a test module or a step still has Meta's class. The tests need expecttest.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

FOLDERS = ("distributed_shampoo/tests", "distributed_shampoo/gpu_tests")


class Substitution:
    """A pytest plugin: DashShampoo where the tests look for DistributedShampoo, and counts of it."""

    def __init__(self) -> None:
        import distributed_shampoo
        import distributed_shampoo.distributed_shampoo as module

        import dash_shampoo

        self.original = module.DistributedShampoo
        self.ours = dash_shampoo.DashShampoo
        if self.original not in self.ours.__mro__:
            raise RuntimeError(f"{self.ours.__mro__} does not derive from Meta's class")
        module.DistributedShampoo = distributed_shampoo.DistributedShampoo = self.ours  # type: ignore[misc]
        self.tests: Counter[str] = Counter()
        self.modules: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        register_optimizer_step_post_hook(self._count_step)

    def _count_step(self, optimizer: Optimizer, *_: Any) -> None:
        if isinstance(optimizer, self.ours):
            groups = optimizer._per_group_state_lists
            lists = [group["shampoo_preconditioner_list"] for group in groups]
            is_stacked = any(type(one).__module__.startswith("dash_shampoo.") for one in lists)
            self.steps["stacked" if is_stacked else "on the base's list"] += 1
        elif isinstance(optimizer, self.original):
            self.steps["of Meta's class"] += 1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Looks which class the test modules have got."""
        for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
            found = getattr(module, "DistributedShampoo", None)
            if found is not None:
                self.modules["substituted" if found is self.ours else "not substituted"] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Keeps the counts that pytest prints."""
        for outcome in ("passed", "skipped", "failed", "error"):
            self.tests[outcome] = len(terminalreporter.stats.get(outcome, ()))

    def complaints(self) -> list[str]:
        """Why the run says nothing about DashShampoo."""
        wrong = {
            "no test passed": not self.tests["passed"],
            "no test module imports DistributedShampoo": not self.modules["substituted"],
            "a test module has Meta's class": self.modules["not substituted"],
            "no step was taken with stacked blocks": not self.steps["stacked"],
            "a step was taken by Meta's class": self.steps["of Meta's class"],
        }
        return [sentence for sentence, is_so in wrong.items() if is_so]


def main(checkout: str, *arguments: str) -> int:
    """Runs the tests, prints the counts, and returns the exit status."""
    root = Path(checkout).resolve()
    folders = [root / folder for folder in FOLDERS]
    for folder in folders:
        if not folder.is_dir():
            print(f"{folder} is missing: META must be a checkout of facebookresearch/optimizers.")
            return 2
    os.environ["DASH_SHAMPOO_BASE"] = "meta"
    sys.path.insert(0, str(root))
    plugin = Substitution()
    # Neither our configuration nor theirs, and nothing is written into the checkout.
    options = ["-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-q"]
    options += ["-o", "python_files=*_test.py", "-W", "ignore"]
    sys.dont_write_bytecode = True
    status = int(pytest.main([*options, *map(str, folders), *arguments], plugins=[plugin]))
    for name, counts in (
        ("tests", plugin.tests),
        ("test modules", plugin.modules),
        ("steps", plugin.steps),
    ):
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for complaint in plugin.complaints():
        print(f"error: {complaint}")
        status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
