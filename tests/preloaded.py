"""What the fork server of `processes.py` imports, once for all processes that it makes."""

import contextlib
import gc
import importlib

NAMES = (
    # The first optimizer of a process imports it, which takes as long as importing torch.
    "torch._dynamo",
    *("tests.distributed.consolidation_workers", "tests.distributed.dash_workers"),
    *("tests.distributed.replica_workers", "tests.distributed.workers"),
    *("hydra", "experiments.composition", "experiments.train", "experiments.checkpoint"),
    *("experiments.classify", "experiments.bench"),
)

for name in NAMES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

# A collection in a process would look at all that, and copy its pages.
gc.collect()
gc.freeze()
