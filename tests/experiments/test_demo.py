import struct

import pytest

from experiments.demo import demo_table, typical
from experiments.main import main
from experiments.metrics import read_metrics
from experiments.plots import Curve
from tests.experiments.composing import composed


def test_demo_writes_a_table_and_plots(tiny, tmp_path, capsys):
    folder = tmp_path / "demo"
    words = [*tiny, "steps=4", f"output_dir={folder}"]
    assert main(["demo", *words]) == 0
    printed = capsys.readouterr().out
    text = (folder / "README.md").read_text()
    runs = composed([], "demo").runs
    assert {"adamw", "distributed_shampoo", "dash_eigen", "dash_newton_db"} <= set(runs)
    for run in runs.values():
        assert f"| {run.label} " in text
        assert f"| {run.label} " in printed
    for name in ("validation_loss.png", "step_time.png"):
        assert name in text
        assert str(folder / name) in printed
        width, height = png_size(folder / name)
        assert width > 800
        assert height > 300
    records = {name: read_metrics(folder / "runs" / name / "metrics.jsonl") for name in runs}
    first_losses = {r["loss"] for run in records.values() for r in run[1:3] if r["step"] < 2}
    assert len(first_losses) == 2  # one before training, one of the first batch: equal for all


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_demo_tells_mistakes(capsys):
    assert main(["demo", "nothing=1"]) == 2
    assert "Key 'nothing' not in" in capsys.readouterr().err


def curve(label, losses, seconds):
    return Curve(label, [0, 10, 20], seconds, losses, model_ms=100.0, optimizer_ms=3.0)


def test_the_table_tells_when_the_baseline_was_reached():
    curves = [
        curve("A", [5.0, 4.0, 3.0], [0, 1, 2]),
        curve("B", [5.0, 3.5, 2.5], [0, 2, 4]),
        curve("C", [5.0, 4.5, 4.0], [0, 1, 2]),
    ]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in demo_table(curves, [0.1, 0.02, 3e-4]).splitlines()
    ]
    assert rows[2] == ["A", "0.1", "3.000", "100", "3.0", "20", "2.0"]
    assert rows[3] == ["B", "0.02", "2.500", "100", "3.0", "15", "3.0"]
    assert rows[4] == ["C", "0.0003", "4.000", "100", "3.0", "-", "-"]


def test_the_typical_time_counts_rare_work_but_not_outliers():
    cycle = [9.0, 1.0, 1.0]
    assert typical([500.0, *cycle * 5], period=3) == pytest.approx(11 / 3)
    disturbed = [500.0, *cycle * 5]
    disturbed[5] = 1000.0
    assert typical(disturbed, period=3) == pytest.approx(11 / 3)
    assert typical([7.0], period=3) == 7.0
    assert typical([7.0, 2.0], period=3) == 2.0


@pytest.mark.parametrize("turn", [1, 3])
def test_turns_do_not_change_the_result(turn, tiny, tmp_path, capsys):
    words = [*tiny, "steps=4", f"turn={turn}", f"output_dir={tmp_path}"]
    assert main(["demo", *words, "~runs.distributed_shampoo", "~runs.dash_eigen"]) == 0
    name = "dash_newton_db"
    alone = composed([], "demo").runs[name].overrides
    assert main(
        ["train", "experiment=demo", *alone, *tiny, "steps=4", f"output_dir={tmp_path / 'one'}"]
    ) == 0  # fmt: skip
    curves = [
        [r["loss"] for r in read_metrics(path) if "loss" in r]
        for path in (tmp_path / "runs" / name / "metrics.jsonl", tmp_path / "one/metrics.jsonl")
    ]
    assert curves[0] == curves[1]
