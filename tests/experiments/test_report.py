import json
import re

import pytest

from experiments.main import main
from experiments.report_blocks import block_maps
from experiments.runs import experiments, find_runs, first_reached

pytest.importorskip("plotly", reason="plotly is not installed")


def sweep(tiny, folder, *more):
    words = [*tiny, "steps=4", "evaluate_every=2", f"output_dir={folder}", *more]
    return main(["sweep", *words])


def write_run(folder, label, losses, seed=1, diverged=False, failures=None, **settings):
    """A run's records, as the trainer writes them."""
    config = {"steps": len(losses) - 1, "seed": seed, "optimizer": {"lr": 0.1, **settings}}
    records = [
        {"event": "start", "label": label, "config": config, "torch": "2", "device": "a CPU"}
    ]
    for step, loss in enumerate(losses):
        common = {"step": step, "seconds": 0.5 * step, "tokens": 10 * step}
        records.append({"event": "validation", "loss": loss, "perplexity": 1.0, **common})
        if failures is not None:
            records[-1]["failures"] = {"weight<1>": failures * step}
        if step:
            times = {"forward_ms": 1.0, "backward_ms": 2.0, "optimizer_ms": 3.0 * step}
            records.append(
                {"event": "train", "loss": loss, "peak_memory_mib": 9.0, **times, **common}
            )
    if diverged:
        records.append({"event": "train", "loss": None, "step": len(losses)})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a1", "A", [5.0, 4.0, 3.0], seed=1)
    write_run(tmp_path / "a2", "A", [5.0, 4.2, 3.2], seed=2)
    write_run(tmp_path / "a3", "A", [5.0, 4.5, 3.9], seed=1, lr=0.3)
    write_run(tmp_path / "b" / "b1", "B & <b>", [5.0, 3.5, 2.0], failures=2)
    write_run(tmp_path / "c", "C", [5.0], diverged=True)
    return tmp_path


def test_seeds_are_put_together_and_the_best_is_first(runs):
    found = experiments(find_runs([runs]))
    assert [(e.label, len(e.runs)) for e in found] == [
        ("B & <b>", 1), ("A, lr=0.1", 2), ("A, lr=0.3", 1), ("C", 1),
    ]  # fmt: skip
    assert found[1].mean_loss == pytest.approx(3.1)
    assert found[1].mean("optimizer_ms") == 6.0  # the first step is left out
    assert found[3].mean_loss == float("inf")
    assert [run.is_done for e in found for run in e.runs] == [True] * 5
    assert first_reached(found[1].runs[0], 4.1)["step"] == 1
    assert first_reached(found[1].runs[0], 1.0) is None


def test_the_page_has_everything_in_it(runs, capsys):
    assert main(["report", str(runs)]) == 0
    assert "5 runs" in capsys.readouterr().out
    page = (runs / "report.html").read_text()
    assert "B &amp; &lt;b&gt;" in page
    assert "<td>3.1000 ± 0.1414</td>" in page
    assert "diverged" in page
    assert "A, lr=0.3" in page
    for title in ("Summary", "Validation loss", "learning rate", "Time of a step", "Settings"):
        assert f"{title}</h2>" in page
    assert "Inverse roots that were not accepted</h2>" in page
    # Nothing is fetched: the library itself is in the page.
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "Plotly.newPlot" in page
    assert len(page) < 8e6
    without_b = runs / "a1"
    assert main(["report", str(without_b), "--out", str(runs / "one.html")]) == 0
    assert "not accepted" not in (runs / "one.html").read_text()


def test_blocks_are_maps_by_parameter_and_step(runs):
    def block(name, condition, update):
        numbers = {"residual": 0.1, "factor_norm": 1.0, "root_norm": 1.0}
        factor = {"condition": condition, "steps_since_good_root": 0, **numbers}
        return {"parameter": name, "block": "0", "update_to_weight": update, "factors": [factor]}

    path = runs / "b" / "b1" / "metrics.jsonl"
    for step in (1, 2):
        blocks = [block("one<w>", 10.0**step, 0.01), block("one<w>", 5.0, None)]
        record = {
            "event": "diagnostics",
            "step": step,
            "blocks": [*blocks, block("two", None, 0.1)],
        }
        path.write_text(path.read_text() + json.dumps(record) + "\n")
    (experiment, *_) = experiments(find_runs([runs / "b"]))
    maps = {f.layout.title.text: f.data[0] for f in block_maps(experiment)}
    condition = maps["condition of the factor matrices"]
    assert condition.y == ("one<w>",)  # of the other there is none
    assert [list(row) for row in condition.z] == [[1.0, 2.0]]  # the worst block's power of ten
    assert condition.x == ("1", "2")
    assert maps["size of the update beside the weights"].y == ("one<w>", "two")
    assert len(maps) == 4
    assert main(["report", str(runs)]) == 0
    page = (runs / "report.html").read_text()
    assert "Blocks and roots</h2>" in page
    assert "<w>" not in page


def test_workers_share_a_sweep(tiny, tmp_path, capfd):
    words = ["optimizer=adamw", "optimizer.lr=0.001,0.002,0.004,0.008"]
    assert sweep(tiny, tmp_path, *words, "--workers", "2") == 0
    out = capfd.readouterr().out
    assert len(find_runs([tmp_path])) == 4
    trained = [line for line in out.splitlines() if "training tokens" in line]
    assert len(trained) == 4  # each by one of the workers
    passed = [
        line for line in out.splitlines() if "another worker" in line or "already done" in line
    ]
    assert len(passed) == 4
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == 6
    assert sweep(tiny, tmp_path, *words, "--workers", "none") == 2
    assert "--workers=none must be at least 1" in capfd.readouterr().err


def test_a_sweep_compares_and_goes_on_where_it_was(tiny, tmp_path, capsys):
    words = ["optimizer=adamw,muon", "optimizer.lr=0.001,0.02", "seed=1"]
    assert sweep(tiny, tmp_path, *words) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")][2:]
    assert len(table) == 4
    assert ["lr=0.02" in line for line in table] == [True, True, False, False]
    assert (tmp_path / "report.html").is_file()
    names = {path.parent.name for path in tmp_path.glob("*/metrics.jsonl")}
    assert "optimizer.lr=0.02,optimizer=muon" in names
    assert len(names) == 4
    more = ["optimizer=adamw", words[1], "seed=1,2"]
    assert sweep(tiny, tmp_path, *more) == 0
    printed = capsys.readouterr().out
    assert "seed=1" in printed
    assert len(find_runs([tmp_path])) == 8
    assert sweep(tiny, tmp_path, *more) == 0
    assert capsys.readouterr().out.count("already done: ") == 4


def test_mistakes_are_one_sentence(tiny, tmp_path, capsys):
    for words, message in [
        (["report", str(tmp_path / "nowhere")], "There is no folder"),
        (["report", str(tmp_path)], "There is no run in"),
        (["sweep", "optimizer=adamw,muon"], "output_dir=... must be given"),
        (["sweep", f"output_dir={tmp_path}", "stpes=1,2"], "Did you mean steps?"),
    ]:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
