"""`benchmarks/gpu.py` runs from one end to the other, at toy sizes on the CPU."""

from __future__ import annotations

import pytest

from benchmarks import gpu
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
    assert f"Squares that are wrong: 0 of {4 * len(FUSED_PRECISIONS)}" in text


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
    assert total == pytest.approx(124.4e6, rel=2e-3)
