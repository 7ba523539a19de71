"""Meta's own CIFAR-10 example with one word changed, on one process and on two.

Its files are run as they are. What the machine lacks of it (torchvision, tensorboard) is stood in for: random
images of CIFAR's form, and a writer that writes nothing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("distributed_shampoo.examples", reason="Meta's package is not importable")
pytest.importorskip("hydra", reason="Hydra is not installed")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TORCHVISION = """
    import torch

    class transforms:
        ToTensor = staticmethod(lambda: None)
        Normalize = staticmethod(lambda *_: None)
        Compose = staticmethod(lambda parts: None)

    class datasets:
        class CIFAR10(torch.utils.data.Dataset):
            def __init__(self, path, train, download, transform):
                pass

            def __len__(self):
                return 32

            def __getitem__(self, index):
                image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
                return image, index % 10
"""
TENSORBOARD = """
    class SummaryWriter:
        def __init__(self, log_dir): ...
        def add_scalars(self, **_): ...
        def flush(self): ...
"""
MAIN = """
    import json, os, runpy, sys

    sys.modules["torch.utils.tensorboard"] = __import__("tensorboard_stand_in")
    import torch
    from torch.distributed.tensor import DTensor
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)

    def bytes_of(tree):
        if isinstance(tree, torch.Tensor):
            local = tree.to_local() if isinstance(tree, DTensor) else tree
            return local.numel() * local.element_size()
        return sum(map(bytes_of, tree.values())) if isinstance(tree, dict) else 0

    def report(optimizer, *_):
        params = [p.to_local() if isinstance(p, DTensor) else p
                  for group in optimizer.param_groups for p in group["params"]]
        seen = {
            "class": type(optimizer).__module__,
            "bytes": bytes_of(optimizer.state_dict()["state"]),
            "sum": sum(p.detach().double().sum().item() for p in params),
            "config": type(optimizer.param_groups[0]["distributed_config"]).__name__,
        }
        path = os.environ["REPORT"] + os.environ.get("RANK", "0")
        with open(path, "w") as file:
            json.dump(seen, file)

    register_optimizer_step_post_hook(report)
    name = "distributed_shampoo.examples.cifar10_example"
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""
TARGETS = {
    "theirs": "distributed_shampoo.DistributedShampoo",
    "ours": "dash_shampoo.drop_in.DistributedShampoo",
}


def run(folder: Path, which: str, parallelism: str, num_processes: int, epochs=1) -> list[dict]:
    for name, source in (
        ("torchvision.py", TORCHVISION),
        ("tensorboard_stand_in.py", TENSORBOARD),
        ("main.py", MAIN),
    ):
        (folder / name).write_text(textwrap.dedent(source))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        f"optimizer._target_={TARGETS[which]}",
        f"parallelism={parallelism}",
        "backend=gloo",
        "out_channels=8",
        "batch_size=8",
        "local_batch_size=8",
        "optimizer.precondition_frequency=2",
        "optimizer.max_preconditioner_dim=128",
        f"epochs={epochs}",
        f"checkpoint_dir={folder / 'checkpoint'}",
        f"hydra.run.dir={folder}",
    ]
    processes = []
    for rank in range(num_processes):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]),
            "DASH_SHAMPOO_BASE": "meta",
            "REPORT": str(folder / f"{which}-"),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, str(folder / "main.py"), *arguments]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [json.loads((folder / f"{which}-{rank}").read_text()) for rank in range(num_processes)]


@pytest.mark.parametrize(
    ("parallelism", "num_processes"), [("none", 1), ("ddp", 2), ("fully_shard", 2)]
)
def test_the_example_with_one_word_changed(tmp_path, parallelism, num_processes):
    reports = {}
    for which in TARGETS:
        folder = tmp_path / which
        folder.mkdir()
        reports[which] = run(folder, which, parallelism, num_processes)
    for ours, theirs in zip(reports["ours"], reports["theirs"], strict=True):
        assert ours["class"] == "dash_shampoo.drop_in"
        assert theirs["class"].startswith("distributed_shampoo")
        # The config of the processes arrives, so that a rank keeps its part of the state only.
        assert ours["config"] == theirs["config"]
        assert ours["bytes"] == pytest.approx(theirs["bytes"], rel=0.02)
        assert ours["sum"] == pytest.approx(theirs["sum"], rel=1e-4)
    if parallelism == "ddp":
        whole = run_alone(tmp_path)
        for ours in reports["ours"]:
            assert ours["bytes"] < 0.7 * whole


def run_alone(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    return run(folder, "ours", "none", 1)[0]["bytes"]


def test_the_example_goes_on_from_its_checkpoint(tmp_path):
    run(tmp_path, "ours", "ddp", 2)
    first = json.loads((tmp_path / "ours-0").read_text())
    again = run(tmp_path, "ours", "ddp", 2)
    assert again[0]["bytes"] == first["bytes"]
    assert again[0]["sum"] != first["sum"]
