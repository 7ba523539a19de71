"""`benchmarks/gpu.py` runs from one end to the other, at toy sizes on the CPU."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch

import dash_shampoo as ds
from benchmarks import gpu, gpu_kernels
from benchmarks.device_counts import DeviceCounts
from benchmarks.gpu_bars import bar_table
from benchmarks.step_time import Variant
from dash_shampoo.products.fused import FUSED_PRECISIONS
from dash_shampoo.products.outer import OUTER_PRECISIONS
from dash_shampoo.products.sides import SIDED_PRECISIONS


@pytest.fixture(scope="module", autouse=True)
def small():
    """Stacks of a few blocks, and calls that are timed a few times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_kernels, "ELEMENTS", 2**12)
        patch.setattr(gpu_kernels.queued_milliseconds, "__defaults__", (2,))
        yield


@pytest.fixture
def few_optimizers(monkeypatch):
    """For runs that are about something else."""
    monkeypatch.setattr(gpu, "STEP_CONFIGS", ("default", "coupled_newton"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "report.md"
    text = gpu.main(["--device", "cpu", "--toy", "--output", str(path)])
    return path, text


def test_the_report_and_its_plot_are_written(report):
    path, text = report
    assert path.read_text() == text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "![Squares and steps](report.png)" in text


def test_kernels_are_right_and_all_there(report):
    _, text = report
    assert "| results of kernels that are wrong | 0 | 0 | yes |" in text
    for kernel, precisions in (
        ("square", FUSED_PRECISIONS),
        ("update", OUTER_PRECISIONS),
        ("update, packed", OUTER_PRECISIONS),
        ("sides", SIDED_PRECISIONS),
    ):
        assert text.count(f"| {kernel} |") == 4 * len(precisions)
        for size, precision in product((16, 32, 7, 33), precisions):
            assert re.search(rf"\| {kernel} \| {size} \| \d+ \| {precision} \|", text)


def test_solvers_and_steps_are_there(report):
    _, text = report
    for name in gpu.solver_configs():
        assert f"| {name} |" in text
    for name in ("ours/default", "ours/minimax", "base/coupled_newton", "Muon", "AdamW"):
        assert f"| {name} |" in text


def test_what_begins_too_late_is_left_out(tmp_path, capsys):
    words = ["--device", "cpu", "--toy", "--seconds", "0", "--output", str(tmp_path / "x.md")]
    text = gpu.main(words)
    assert text.count("the time was spent") == len(gpu.solver_configs()) + 1


def test_the_share_of_a_rank_is_an_eighth_of_the_model():
    case = gpu.sizes(is_toy=False).cases["llama-953m-1024"]
    elements = sum(shape.numel() for shape in map(gpu.torch.Size, (s for s, _ in case.shapes)))
    whole = sum(
        count * gpu.torch.Size(shape).numel() for shape, count in gpu.llama(16, 2048, 32000)
    )
    assert elements == pytest.approx(whole / 8, rel=0.15)


def test_gpt2_has_124_million_parameters():
    total = sum(count * gpu.torch.Size(shape).numel() for shape, count in gpu.gpt2())
    padding = (50304 - 50257) * 768
    assert total - padding == 124_439_808


def test_an_optimizer_that_takes_no_step_is_named(monkeypatch, few_optimizers, tmp_path):
    def refuse(block, parameters):
        raise AssertionError("no such blocks")

    monkeypatch.setitem(gpu.PEERS, "AdamW", replace(gpu.PEERS["AdamW"], make=refuse))
    monkeypatch.setattr(gpu_kernels, "KERNELS", ())
    monkeypatch.setattr(gpu, "solver_configs", dict)
    text = gpu.main(["--device", "cpu", "--toy", "--output", str(tmp_path / "x.md")])
    assert "AdamW: AssertionError no such blocks" in text
    assert "÷ AdamW" not in text
    assert "÷ Muon" in text


def test_bars():
    def square(size, precision, **of_case):
        return {"kernel": "square", "N": size, "precision": precision, "is_right": True, **of_case}

    rows = [
        square(64, "fp16", ours=1.0, bmm=0.9, fp32=9.0),
        square(1024, "fp16", ours=1.0, bmm=0.9, fp32=9.0),
        square(2048, "fp16x3", ours=2.0, bmm=9.0, fp32=8.0),
        square(100, "fp16x3") | {"is_right": False},
        {"kernel": "update", "N": 64, "precision": "fp16", "is_right": True, "ours": 1.0},
    ]
    times = {"ours/default": 50.0, "base/coupled_newton": 400.0}
    variants = [Variant(name, "", "", None, {1: [ms]}) for name, ms in times.items()]
    text = bar_table(rows, {"minimax fp16": 0.71}, {"llama-953m-1024": variants})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert {row[0]: row[1:] for row in cells} == {
        "results of kernels that are wrong": ["0", "1", "**no**"],
        "fp16x3 square of 2048, times as fast as fp32": ["4.0", "4.00", "yes"],
        "fp16 square of 64, times as fast as bmm": ["1.0", "0.90", "**no**"],
        "roots by minimax fp16, of the device's rate": ["70%", "71%", "yes"],
        "llama-953m-1024, default, every step, ÷ base/coupled_newton": ["at most 0.1", "0.12", "**no**"],
        "llama-953m-1024, default, every step, ms": ["at most 60", "50.0", "yes"],
    }  # fmt: skip


class Event:
    """What `torch.cuda.Event` is to those who time with it."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


def bmm_of_halves(left, right, out_dtype=None, bmm=torch.bmm, **options):
    """The CPU has none with a result in float32."""
    if out_dtype is not None:
        left, right = left.to(out_dtype), right.to(out_dtype)
    return bmm(left, right, **options)


@pytest.fixture
def pretended_cuda(monkeypatch):
    """Tensors say that they are on a CUDA device, and torch's module of it answers."""
    calls = Counter()
    for name in ("synchronize", "_sleep", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.update([name]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "bmm", bmm_of_halves)
    with DeviceCounts({}, default="") as device:
        yield device, calls


@pytest.mark.skipif(
    ds.base.name == "meta", reason="Meta's class makes a CUDA stream, which torch for a CPU has not"
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_it_runs_to_its_end_on_a_pretended_device(pretended_cuda, monkeypatch, tmp_path):
    """On few sizes and solvers: all of them are in the report of the CPU.

    Every operation of the base's sequential list is looked at, of which `eigen` has few.
    """
    monkeypatch.setattr(gpu, "STEP_CONFIGS", ("default", "eigen"))
    few_sizes = replace(gpu.sizes(is_toy=True), squares=(16, 32), ragged=(7,))
    few_solvers = {
        name: gpu.solver_configs()[name] for name in ("eigen", "newton_db", "minimax fp16")
    }
    monkeypatch.setattr(gpu, "sizes", lambda is_toy: few_sizes)
    monkeypatch.setattr(gpu, "solver_configs", lambda: few_solvers)
    device, calls = pretended_cuda
    switches = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    text = gpu.main(["--toy", "--output", str(tmp_path / "x.md")])
    assert text.startswith("# NVIDIA H100 80GB HBM3")
    # Errors mean nothing: the CPU rounds for a device that it is not.
    assert "ailed" not in text
    assert "NVIDIA H100 SXM, 80 GB HBM3, dense" in text
    assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32) == switches
    assert calls["_sleep"] > 100
    assert calls["synchronize"] > 2 * calls["_sleep"]
    if find_spec("triton"):
        for name in ("symmetric_square_", "accumulate_outer_", "two_sided_"):
            assert device.counts.operations["", name] > 50
        assert "| kernel |" in text


def test_the_report_is_named_by_its_device(pretended_cuda):
    options = gpu.parse([])
    assert re.fullmatch(r"gpu_h100-80gb-hbm3_\d{4}-\d\d-\d\d\.md", options.output.name)


def test_what_fails_loses_nothing_else(monkeypatch, few_optimizers, tmp_path):
    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore")

    name, measure, *others = gpu_kernels.KERNELS[0]
    monkeypatch.setattr(
        gpu_kernels,
        "KERNELS",
        ((name, lambda size, *rest: fail() if size == 32 else measure(size, *rest), *others),),
    )
    monkeypatch.setattr(gpu, "inverse_root", fail)
    monkeypatch.setattr(gpu.step_time, "ratio_table", fail)
    path = tmp_path / "x.md"
    text = gpu.main(["--device", "cpu", "--toy", "--output", str(path)])
    message = "failed: OutOfMemoryError CUDA out of memory |"
    assert text.count(message) == len(FUSED_PRECISIONS) + len(gpu.solver_configs())
    wrong = len(FUSED_PRECISIONS)
    assert f"| results of kernels that are wrong | 0 | {wrong} | **no** |" in text
    assert "Failed: OutOfMemoryError CUDA out of memory.\n" in text
    assert "| square | 16 |" in text
    assert "| square | 33 |" in text
    assert "| ours/default |" in text
    assert path.read_text() == text


def test_optimizers_that_do_not_fit_together_are_timed_one_by_one(monkeypatch):
    calls = []

    def run_case(case, variants, options):
        calls.append([v.name for v in variants])
        if len(variants) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu.step_time, "run_case", run_case)
    variants = [Variant(name, "", "", None) for name in "abc"]
    assert "not interleaved" in gpu.run_steps(None, variants, None)
    assert calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]


def test_of_dash_gpu_only_our_solvers_are_taken():
    assert {name for name in gpu.wanted_peers() if name.startswith("DashGpu")} == {
        "DashGpu/coupled_newton",
        "DashGpu/newton_db",
    }
