"""The paper's grid at a tiny size, and its table of step times."""

import pytest

from experiments.main import main
from experiments.paper_table import PAPER_MS, paper_settings
from experiments.runs import read_run

SMALL = [
    "experiment=demo",
    "model=tiny",
    "data=stdlib_bytes",
    "steps=2",
    "evaluate_every=0",
    "--blocks",
    "8",
]


def paper(tiny, folder, *words):
    model = [w for w in tiny if not w.startswith("model")] + [
        "model.num_layers=1",
        "model.width=16",
    ]
    return main(["paper", "--out", str(folder), *SMALL, *model, "model.num_heads=2", *words])


def test_the_grid_is_the_papers(tmp_path, capsys):
    assert main(["paper", "--dry", "--out", str(tmp_path / "paper")]) == 0
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines() if line.startswith("python -m experiments train")]
    cells = [line for line in out.splitlines() if line.startswith(("| base", "| layer", "| whole"))]
    assert len(cells) == 3 * 2 * 6 * 3
    left_out = [line for line in cells if "left out: the base has no such solver" in line]
    assert len(left_out) == 2 * 3 * 3
    assert len(commands) == len(cells) - len(left_out)
    assert all("experiment=llama_953m" in line for line in commands)
    assert not (tmp_path / "paper").exists()


def test_it_trains_goes_on_and_compares(tiny, tmp_path, capsys):
    only = ["--only", "42,evd_10,cn_fp32,ndb_power_fp32"]
    assert paper(tiny, tmp_path, *only, "stop_after=1") == 0
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(names) == 3 + 3 + 2
    assert "base_8_ndb_power_fp32_seed42" not in names
    assert all(read_run(tmp_path / name).is_done for name in names)
    capsys.readouterr()

    # The same command again has nothing left to do.
    times = {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in names}
    assert paper(tiny, tmp_path, *only, "stop_after=1") == 0
    assert times == {n: (tmp_path / n / "metrics.jsonl").stat().st_mtime_ns for n in names}
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("| 8, evd_10")]
    losses = [float(cell) for cell in row.split("|")[2:5]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)  # one method, three ways
    (row,) = [line for line in out.splitlines() if line.startswith("| 8, ndb_power_fp32")]
    assert row.split("|")[2].strip() == "–"
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "best"], "--only best: one of base, layer_wise, whole, evd_1"),
        (["--blocks", "0"], "argument --blocks: 0 must be a whole number of at least 1"),
        (["--processes", "0"], "argument --processes: 0 must be a whole number of at least 1"),
        (["steps"], "'steps' is neither an option of paper nor KEY=VALUE of train"),
        (["experiment=null"], "Config group override must be a string or a list"),
        (["stepz=2"], "Did you mean steps"),
        (
            ["experiment=llama_953m", "device=cpu", "--only", "whole,evd_1"],
            "data.train must be given",
        ),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, capsys):
    assert main(["paper", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_table_of_times_has_the_papers_rows():
    rows = {(s.name, f) for s in paper_settings("fp32") for f in s.frequencies}
    assert rows == {(setting, frequency) for _, setting, frequency in PAPER_MS}
    assert {block for block, _, _ in PAPER_MS} == {1024, 2048}
