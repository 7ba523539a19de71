"""`benchmarks/gpu.py` runs from one end to the other, at toy sizes on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import gpu
from benchmarks.gpu_bars import bar_table
from benchmarks.step_time import Variant
from dash_shampoo.products.fused import FUSED_PRECISIONS


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


def test_squares_are_right_and_all_there(report):
    _, text = report
    assert "| squares that are wrong | 0 | 0 | yes |" in text
    assert sum(text.count(f"| {precision} |") for precision in FUSED_PRECISIONS) == 4 * len(
        FUSED_PRECISIONS
    )


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


def test_an_optimizer_that_takes_no_step_is_named(monkeypatch, tmp_path):
    def refuse(block, parameters):
        raise AssertionError("no such blocks")

    monkeypatch.setitem(gpu.PEERS, "AdamW", replace(gpu.PEERS["AdamW"], make=refuse))
    text = gpu.main(["--device", "cpu", "--toy", "--output", str(tmp_path / "x.md")])
    assert "AdamW: AssertionError no such blocks" in text
    assert "÷ AdamW" not in text
    assert "÷ Muon" in text


def test_bars():
    squares = [
        {"N": 64, "precision": "fp16", "is_right": True, "ours": 1.0, "bmm": 0.9, "fp32": 9.0},
        {"N": 1024, "precision": "fp16", "is_right": True, "ours": 1.0, "bmm": 0.9, "fp32": 9.0},
        {"N": 2048, "precision": "fp16x3", "is_right": True, "ours": 2.0, "bmm": 9.0, "fp32": 8.0},
        {"N": 100, "precision": "fp16x3", "is_right": False},
    ]
    times = {"ours/default": 50.0, "base/coupled_newton": 400.0}
    variants = [Variant(name, "", "", None, {1: [ms]}) for name, ms in times.items()]
    text = bar_table(squares, {"minimax fp16": 0.71}, {"llama-953m-1024": variants})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert {row[0]: row[1:] for row in rows} == {
        "squares that are wrong": ["0", "1", "**no**"],
        "fp16x3 square of 2048, times as fast as fp32": ["4.0", "4.00", "yes"],
        "fp16 square of 64, times as fast as bmm": ["1.0", "0.90", "**no**"],
        "roots by minimax fp16, of the device's rate": ["70%", "71%", "yes"],
        "llama-953m-1024, default, every step, ÷ base/coupled_newton": ["at most 0.1", "0.12", "**no**"],
        "llama-953m-1024, default, every step, ms": ["at most 60", "50.0", "yes"],
    }  # fmt: skip
