import importlib.util
import re
import struct

import pytest

from experiments.demo import baseline_note, demo_table, typical
from experiments.main import main
from experiments.metrics import read_metrics
from experiments.plots import Curve, loss_range
from tests.experiments.composing import composed


def test_demo_writes_a_table_and_plots(tiny, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "experiments.demo.importlib.util.find_spec",
        lambda name: None if name == "pytorch_optimizer" else find_spec(name),
    )
    folder = tmp_path / "demo"
    words = [*tiny, "steps=4", f"output_dir={folder}"]
    assert main(["demo", *words]) == 0
    printed = capsys.readouterr().out
    text = (folder / "README.md").read_text()
    runs = composed([], "demo").runs
    assert {"adamw", "muon", "soap", "distributed_shampoo", "dash_eigen", "dash_default"} <= set(
        runs
    )
    assert "SOAP is left out: the package pytorch_optimizer is not installed." in text
    assert "SOAP is left out" in printed
    runs = {name: run for name, run in runs.items() if name != "soap"}
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
    # At other settings than those that were swept, nothing is said of the sweep.
    assert "best of a sweep" in composed([], "demo").note
    assert "best of a sweep" not in text
    assert "Blocks of 64, roots renewed every 10 steps: Distributed Shampoo, eigen; Dash" in text
    assert "Blocks of 64, roots renewed in every step: DashShampoo, default." in text


ALL_BUT_ADAMW = [f"~runs.{name}" for name in composed([], "demo").runs if name != "adamw"]


def test_a_short_run_has_a_curve_too(tiny, tmp_path):
    words = [word for word in tiny if not word.startswith("evaluate_every")]
    assert main(["demo", *words, "steps=20", *ALL_BUT_ADAMW, f"output_dir={tmp_path}"]) == 0
    records = read_metrics(tmp_path / "runs" / "adamw" / "metrics.jsonl")
    steps = [r["step"] for r in records if r["event"] == "validation"]
    assert steps == list(range(0, 21, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11, 100])
@pytest.mark.parametrize("slope", [-1.0, 0.0, 2.0])
def test_the_picture_shows_the_curves(count, slope):
    losses = [5.0 + slope * (1 - 0.8**place) for place in range(count)]
    short = curve("diverged", losses[:2], [0, 1])
    shown = [
        curve("A", losses, range(count)),
        curve("B", [x + 0.1 for x in losses], range(count)),
        short,
    ]
    bottom, top = loss_range(shown)
    assert bottom < top
    for one in shown[:2]:
        inside = [loss for loss in one.losses if bottom <= loss <= top]
        assert len(inside) >= min(count, 3)
        assert bottom <= one.losses[-1] <= top


def test_of_several_a_run_that_rises_leaves_the_picture_at_its_top():
    bottom, top = loss_range(
        [curve("A", [5.0, 4.0, 3.0], range(3)), curve("B", [5.0, 9.0, 90.0], range(3))]
    )
    assert bottom < 3.0
    assert 5.0 < top < 6.0


def test_where_the_baseline_learned_nothing_none_is_reached():
    curves = [curve("A", [5.0, 8.0, 7.0], [0, 1, 2]), curve("B", [5.0, 6.0, 5.5], [0, 1, 2])]
    *_, a, b = demo_table(curves, [0.3, 0.3]).splitlines()
    assert [line.split("|")[-3].strip() for line in (a, b)] == ["-", "-"]
    assert "A ended at 7.000, above the 5.000 of the untrained model" in baseline_note(curves)


def test_a_run_that_diverges_leaves_the_others_be(tiny, tmp_path, capsys):
    words = [*tiny, "steps=4", f"output_dir={tmp_path}", "clip_grad_norm=null"]
    kept = [word for word in ALL_BUT_ADAMW if "muon" not in word]
    bad = "runs.adamw.overrides=['optimizer=adamw','optimizer.lr=1e30']"
    assert main(["demo", *words, *kept, bad]) == 0
    text = (tmp_path / "README.md").read_text()
    assert re.search(r"\| AdamW +\| +1e\+30 \| +diverged \|", text)
    assert re.search(r"\| Muon with AdamW +\| +0\.\d+ \| +\d\.\d+ \|", text)
    assert "AdamW diverged, so there is no baseline to reach." in text


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_demo_tells_mistakes(capsys):
    assert main(["demo", "nothing=1"]) == 2
    assert "Key 'nothing' not in" in capsys.readouterr().err


def curve(label, losses, seconds):
    return Curve(label, [0, 10, 20], list(seconds), losses, model_ms=100.0, optimizer_ms=3.0)


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
    name = "dash_newton_db"
    others = [
        f"~runs.{other}" for other in composed([], "demo").runs if other not in (name, "adamw")
    ]
    words = [*tiny, "steps=4", f"turn={turn}", f"output_dir={tmp_path}"]
    assert main(["demo", *words, *others]) == 0
    alone = composed([], "demo").runs[name].overrides
    assert main(
        ["train", "experiment=demo", *alone, *tiny, "steps=4", f"output_dir={tmp_path / 'one'}"]
    ) == 0  # fmt: skip
    curves = [
        [r["loss"] for r in read_metrics(path) if "loss" in r]
        for path in (tmp_path / "runs" / name / "metrics.jsonl", tmp_path / "one/metrics.jsonl")
    ]
    assert curves[0] == curves[1]
