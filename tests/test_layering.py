"""Who may import whom, checked over the syntax trees of the package.

The same table stands in CONTRIBUTING.md; `tests/docs/test_markdown.py` compares the two.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE, EXPERIMENTS = "dash_shampoo", "experiments"
ROOT = Path(__file__).resolve().parents[1]

# A room is a module or a package directly below dash_shampoo; "dash_shampoo" is its __init__.py, and
# "experiments" all that lies in that folder beside the package.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "buckets": {"base", "products"},
    "products": set(),
    "inverse_root": {"base", "products"},
    "config": {"base", "inverse_root"},
    "eigenbasis": {"base", "inverse_root", "products"},
    "orthogonalization": {"base", "inverse_root", "products"},
    "safety": {"base", "config", "inverse_root"},
    "gradients": {"base", "buckets", "config", "safety"},
    "preconditioners": {
        "base",
        "buckets",
        "config",
        "eigenbasis",
        "inverse_root",
        "orthogonalization",
        "products",
        "safety",
    },
    "step": {"base", "buckets", "config", "gradients", "preconditioners", "safety"},
    "graphs": set(),
    "captured": {"base", "buckets", "config", "graphs", "preconditioners", "step"},
    "checkpoint": {
        "base",
        "config",
        "distribution",
        "eigenbasis",
        "inverse_root",
        "orthogonalization",
        "preconditioners",
    },
    "guards": {"base", "buckets", "checkpoint"},
    "distribution": {"base"},
    "consolidation": {"base", "distribution", "guards", "resharding"},
    "resharding": {"base", "guards"},
    "diagnostics": {"base", "buckets", "inverse_root", "preconditioners", "safety", "step"},
    "optimizer": {
        "base",
        "captured",
        "config",
        "consolidation",
        "diagnostics",
        "distribution",
        "gradients",
        "planning",
        "preconditioners",
        "step",
    },
    "planning": {
        "products",
        "base",
        "buckets",
        "config",
        "eigenbasis",
        "inverse_root",
        "orthogonalization",
        "preconditioners",
    },
    "drop_in": {"optimizer"},
    "grouping": {"base", "planning"},
    "recipes": {"base", "config", "grouping"},
    "dash_shampoo": {
        "base",
        "checkpoint",
        "config",
        "diagnostics",
        "distribution",
        "optimizer",
        "eigenbasis",
        "grouping",
        "inverse_root",
        "orthogonalization",
        "planning",
        "preconditioners",
        "recipes",
    },
    "experiments": {"dash_shampoo", "inverse_root", "planning"},
}
# What is imported by everyone is torch; the rest by these rooms (or files) alone.
THIRD_PARTY: dict[str, set[str]] = {
    "products": {"triton"},
    "experiments": {
        "hydra",
        "omegaconf",
        "matplotlib",
        "sentencepiece",
        "sklearn",
        "torchvision",
        "mnist1d",
        "pytorch_optimizer",
        "plotly",
        "datasets",
        "huggingface_hub",
        "wandb",
        "tqdm",
        "numpy",
        "benchmarks",
    },
}
DOOR = "dash_shampoo.base"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def sources() -> dict[str, str]:
    paths = [path for top in (PACKAGE, EXPERIMENTS) for path in sorted((ROOT / top).rglob("*.py"))]
    return {module_name(path): path.read_text() for path in paths}


def imports(module: str, source: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `source` imports, relative imports resolved.

    `from dash_shampoo import x` counts as an import of the module `dash_shampoo.x` where there is one.
    So does an attribute `dash_shampoo.x`, and a literal argument of `import_module` and `__import__`.
    """
    own_names: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                if alias.name.split(".")[0] == PACKAGE:
                    own_names[alias.asname or PACKAGE] = alias.name if alias.asname else PACKAGE
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                is_package = any(other.startswith(f"{module}.") for other in modules)
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                origin = ".".join([*parents, origin]).rstrip(".")
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield node.lineno, full if full in modules else origin
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).split(".")[-1]
            if function in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            full = f"{own_names.get(node.value.id, '')}.{node.attr}"
            if full in modules:
                yield node.lineno, full


def violations(files: dict[str, str]) -> list[str]:
    modules = set(files)
    found = set()
    for module, source in files.items():
        room = room_of(module)
        for line, target in imports(module, source, modules):
            top = target.split(".")[0]
            where = f"{module}:{line}"
            if top in (PACKAGE, EXPERIMENTS):
                other = room_of(target)
                if other != room and other not in MAY_IMPORT.get(room, set()):
                    found.add(f"{where} {room} must not import {other}")
                if room == EXPERIMENTS != other and target.count(".") > 1:
                    found.add(f"{where} experiments must not look inside {other}")
            elif top == "distributed_shampoo":
                if module != DOOR:
                    found.add(f"{where} only {DOOR} imports distributed_shampoo")
            elif top not in sys.stdlib_module_names | {"torch"} | THIRD_PARTY.get(room, set()):
                found.add(f"{where} {room} must not import {top}")
    return sorted(found)


def test_discovery_finds_every_room():
    rooms = {room_of(module) for module in sources()}
    assert rooms == set(MAY_IMPORT), "Give a new room its row in MAY_IMPORT and in CONTRIBUTING.md."
    assert len(sources()) >= 15


def test_the_table_has_no_cycle():
    order: list[str] = []

    def visit(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, f"{' -> '.join(above)} -> {room}"
        for other in sorted(MAY_IMPORT[room]):
            visit(other, (*above, room))
        if room not in order:
            order.append(room)

    for room in MAY_IMPORT:
        visit(room, ())
    assert order.index("base") < order.index("optimizer") < order.index("experiments")


def test_rooms_import_only_what_they_may():
    assert violations(sources()) == []


def full_name(module: str) -> str:
    return module if module.startswith(EXPERIMENTS) else f"{PACKAGE}.{module}"


def empty_files() -> dict[str, str]:
    rooms = [name for name in MAY_IMPORT if name != PACKAGE]
    return dict.fromkeys(
        [PACKAGE, *map(full_name, [*rooms, "buckets.layout", "inverse_root.newton_db"])], ""
    )


BAD = [
    ("buckets.layout", "from dash_shampoo.config import NewtonDBConfig", "buckets must not import config"),
    ("buckets.layout", "from ..config import NewtonDBConfig", "buckets must not import config"),
    ("buckets.layout", "from .. import config", "buckets must not import config"),
    ("buckets", "from .layout import x\nfrom ..config import x", "buckets must not import config"),
    ("inverse_root", "from dash_shampoo import config", "inverse_root must not import config"),
    ("products", "from dash_shampoo import inverse_root", "products must not import inverse_root"),
    ("config", "def f():\n    import dash_shampoo.optimizer", "config must not import optimizer"),
    ("config", "import dash_shampoo.base\ndash_shampoo.buckets.layout", "config must not import buckets"),
    ("products", "from dash_shampoo.base import DistributedShampoo", "must not import base"),
    ("buckets", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dash_shampoo import config",
     "buckets must not import config"),
    ("optimizer", "import importlib\nimportlib.import_module('dash_shampoo.buckets.layout')",
     "optimizer must not import buckets"),
    ("experiments.main", "import dash_shampoo as ds\nds.buckets.make_layout", "must not import buckets"),
    ("experiments.main", "from dash_shampoo.base import name", "experiments must not import base"),
    ("experiments.main", "from dash_shampoo.inverse_root.newton_db import x", "must not look inside"),
    ("config", "import dash_shampoo", "config must not import dash_shampoo"),
    ("optimizer", "import distributed_shampoo", "only dash_shampoo.base imports"),
    ("base.embedded", "from distributed_shampoo.shampoo_types import PARAMS", "only dash_shampoo.base"),
    ("optimizer", "import numpy as np", "optimizer must not import numpy"),
    ("inverse_root.newton_db", "import triton", "inverse_root must not import triton"),
    ("optimizer", "import experiments.train", "optimizer must not import experiments"),
    ("experiments.train", "import transformers", "experiments must not import transformers"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "source", "message"), BAD)
def test_the_checker_catches(module, source, message):
    assert violations(empty_files()) == []
    found = violations(empty_files() | {full_name(module): source})
    assert len(found) == 1
    assert message in found[0]


GOOD = [
    (
        "preconditioners",
        "from dash_shampoo.buckets import make_layout\nimport torch.nn.functional as F",
    ),
    ("buckets", "from dash_shampoo.buckets.layout import make_layout"),
    (
        "experiments.main",
        "import dash_shampoo as ds\nds.DashShampoo\nfrom dash_shampoo import NewtonDBConfig",
    ),
    ("experiments.main", "from dash_shampoo.inverse_root import inverse_root\nimport hydra"),
    ("base", "import importlib\nfrom distributed_shampoo import DistributedShampoo"),
    ("config", "import math\nfrom collections.abc import Sequence"),
]


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_the_checker_allows(module, source):
    assert violations(empty_files() | {full_name(module): source}) == []


def run_apart(script: str) -> None:
    """Runs a script in a process of its own, on the embedded base."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DASH_SHAMPOO_BASE": "embedded",
    }
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_does_not_bring_in_the_compiler():
    """torch._dynamo takes as long to import as torch; only a compiled step may pay for it."""
    run_apart("""
        import sys, dash_shampoo
        assert "torch._dynamo" not in sys.modules
    """)


def test_the_package_runs_with_torch_alone():
    """Everything that an import may find missing on a user's machine is made missing here."""
    run_apart("""
        from importlib.machinery import PathFinder

        missing = {"distributed_shampoo", "triton", "hydra", "omegaconf", "matplotlib", "tqdm",
                   "numpy", "scipy", "pytest", "yaml"}
        find_spec = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *where: (
            None if name.split(".")[0] in missing else find_spec(name, *where)
        )
        import torch, dash_shampoo
        p = torch.nn.Parameter(torch.ones(4, 4))
        p.grad = torch.eye(4)
        dash_shampoo.DashShampoo([p], lr=0.1).step()
        assert not torch.equal(p, torch.ones(4, 4))
    """)
