"""The optional patches hold our own lines only, apply to Meta's package, work, and can be reverted."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
README = (ROOT / "patches" / "README.md").read_text()
# Where each patch belongs, and git's id of the file at the commit that patches/README.md names.
FILES = {
    "solver_configs.patch": "distributed_shampoo/preconditioner/matrix_functions.py",
    "stacked_list.patch": "distributed_shampoo/distributed_shampoo.py",
}


def blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), **environment}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def apply(folder: Path, patch: str, *options: str) -> None:
    run(["git", "apply", "--unidiff-zero", *options, str(ROOT / "patches" / patch)], folder)


@pytest.fixture
def meta(tmp_path):
    """A copy of Meta's package; skips where there is none, or another version."""
    spec = importlib.util.find_spec("distributed_shampoo")
    if spec is None or spec.origin is None:
        pytest.skip(
            "Meta's package is not importable (`make install-meta`, or META=... of a checkout)"
        )
    source = Path(spec.origin).parent
    shutil.copytree(
        source,
        tmp_path / "copy" / "distributed_shampoo",
        ignore=shutil.ignore_patterns("__pycache__", "tests", "gpu_tests", "examples"),
    )
    for path in FILES.values():
        if blob_id(tmp_path / "copy" / path) not in README:
            pytest.skip(f"{path} of the importable package is not that of the patches' commit")
    return tmp_path / "copy"


def test_every_patch_is_tested():
    assert [path.name for path in PATCHES] == sorted(FILES)
    assert all(f"`{name}`" in README for name in FILES)


def foreign_lines(patch: str) -> list[str]:
    """Lines of a diff that may come from the patched file: context, removals, section names."""
    allowed = re.compile(r"\+|--- a/\S+$|@@ -\d+,0 \+\d+(,\d+)? @@$")
    return [line for line in patch.splitlines() if not allowed.match(line)]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.name)
def test_patches_hold_only_added_lines(patch):
    text = patch.read_text()
    assert foreign_lines(text) == []
    assert text.startswith(f"--- a/{FILES[patch.name]}\n+++ b/{FILES[patch.name]}\n@@ ")


def test_foreign_lines_are_found():
    good = "--- a/x.py\n+++ b/x.py\n@@ -3,0 +4,2 @@\n+ours\n+ours\n"
    assert foreign_lines(good) == []
    for bad in (" context", "-removed", "@@ -3,2 +3,2 @@", "@@ -3,0 +4 @@ def theirs():"):
        assert foreign_lines(good + bad) == [bad]


def test_patches_apply_and_revert(meta):
    before = {path: (meta / path).read_text() for path in FILES.values()}
    for patch, path in FILES.items():
        apply(meta, patch, "--check")
        apply(meta, patch)
        added = len((meta / path).read_text().splitlines()) - len(before[path].splitlines())
        assert added == (ROOT / "patches" / patch).read_text().count("\n+") - 1
        compile((meta / path).read_text(), path, "exec")
    for patch in reversed(FILES):
        apply(meta, patch, "--reverse")
    assert {path: (meta / path).read_text() for path in FILES.values()} == before


# Trains with Meta's own class and with DashShampoo on the same gradients, in float64, without grafting
# (which would hide a wrong scale), and compares the parameters.
TRAIN = """
    import torch
    import dash_shampoo as ds
    from distributed_shampoo import DistributedShampoo, RootInvShampooPreconditionerConfig

    assert ds.base.name == "meta" and DistributedShampoo is ds.DistributedShampoo

    def train(optimizer_class, config_class, solver):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(s).double()) for s in ((8, 8), (5, 8), (3,))]
        initial = [p.detach().clone() for p in parameters]
        optimizer = optimizer_class(
            parameters, lr=0.1, betas=(0.9, 0.95), epsilon=1e-6, max_preconditioner_dim=8,
            precondition_frequency=1, start_preconditioning_step=1, grafting_config=None,
            preconditioner_config=config_class(
                amortized_computation_config=solver,
                num_tolerated_failed_amortized_computations=0,
                factor_matrix_dtype=torch.float64,
                inv_factor_matrix_dtype=torch.float64,
            ),
        )
        for _ in range(4):
            for p in parameters:
                p.grad = torch.randn(p.shape).double()
            optimizer.step()
        lists = [s["shampoo_preconditioner_list"] for s in optimizer._per_group_state_lists]
        print(optimizer_class.__name__, *(type(l).__name__ for l in lists))
        assert all(not torch.equal(p, q) for p, q in zip(parameters, initial))
        return parameters

    for solver in ({solvers}):
        results = [train(c, {config}, solver) for c in (DistributedShampoo, ds.DashShampoo)]
        for mine, theirs in zip(*results):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
"""


def train(folder: Path, config: str, *solvers: str) -> list[str]:
    """Lines of optimizer and list, two per solver."""
    script = textwrap.dedent(TRAIN).format(config=config, solvers=", ".join([*solvers, ""]))
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {"PYTHONPATH": path, "DASH_SHAMPOO_BASE": "meta", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return run(command, folder, **environment).stdout.splitlines()


REPAIRED = "ds.EigenConfig(rank_deficient_stability_config=ds.SpectrumRepairConfig(method='abs'))"


def test_metas_own_class_computes_with_our_solvers(meta):
    solvers = ("ds.NewtonDBConfig()", "ds.ChebyshevConfig()", REPAIRED)
    config = "RootInvShampooPreconditionerConfig"
    with pytest.raises(AssertionError, match="not implemented"):
        train(meta, config, *solvers)
    apply(meta, "solver_configs.patch")
    lines = train(meta, config, *solvers)
    assert lines.count("DistributedShampoo RootInvShampooPreconditionerList") == len(solvers)


def test_metas_own_class_uses_the_stacked_list(meta):
    solvers = ("ds.NewtonDBConfig()", "ds.EigenConfig()")
    config = "ds.DashShampooPreconditionerConfig"
    with pytest.raises(AssertionError, match="KeyError"):
        train(meta, config, *solvers)
    apply(meta, "stacked_list.patch")
    lines = train(meta, config, *solvers)
    assert lines.count("DistributedShampoo StackedRootInvShampooPreconditionerList") == len(solvers)
