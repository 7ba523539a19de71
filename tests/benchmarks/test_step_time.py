"""The benchmark of a step runs, and knows every solver. How fast it finds them is no test."""

import re

import pytest

import dash_shampoo as ds
import dash_shampoo.config
from benchmarks import step_time
from benchmarks.step_time import CASES, SOLVERS, Case, llama, main, make_gradients, make_parameters


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    case = Case("tiny", [((8, 8), 3), ((8, 4), 1), ((4,), 2)], 8)
    monkeypatch.setattr(step_time, "CASES", {"tiny": case})
    return case


def test_the_table_has_a_row_for_every_solver(tmp_path, capsys):
    output = tmp_path / "results" / "step_time.md"
    words = ["--cases", "tiny", "--rounds", "4", "--warmup", "1", "--threads", "1"]
    text = main([*words, "--output", str(output)])
    assert output.read_text() == text == capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| tiny")]
    assert [row[1].strip() for row in rows] == list(SOLVERS)
    for row in rows:
        base, ours, ratio, _, difference = (cell.strip() for cell in row[2:])
        assert float(ours) > 0
        assert (base == "–") == (ratio == "–") == (difference == "–")
        if SOLVERS[row[1].strip()].on_base:
            assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", ratio)
            # fp32 eigenvectors at a condition number of 1e10 leave about three digits of the step.
            assert float(difference) < 1e-1
    assert f"base {ds.base.name}" in text
    assert "threads of" in text


def test_every_solver_of_ours_has_a_row():
    ours = {
        value
        for name in dash_shampoo.config.__all__
        if isinstance(value := getattr(dash_shampoo.config, name), type)
        and issubclass(value, ds.RootInvConfig)
        and value.__module__ == "dash_shampoo.config"
    }
    assert len(ours) >= 3
    # With its defaults this one is the base's coupled Newton, which has a row.
    ours.discard(ds.ScaledCoupledNewtonConfig)
    assert ours <= {type(solver.make()) for solver in SOLVERS.values()}


def test_a_refresh_interval_is_timed_as_a_whole(monkeypatch, tiny):
    steps = []
    step = ds.DashShampoo.step
    monkeypatch.setattr(ds.DashShampoo, "step", lambda self: (steps.append(1), step(self))[1])
    words = ["--cases", "tiny", "--solvers", "newton_db", "--rounds", "2", "--warmup", "1"]
    main([*words, "--precondition-frequency", "5"])
    assert len(steps) == 15


def test_cases():
    assert {name: sum(count for _, count in case.shapes) for name, case in CASES.items()} == {
        "256x64": 128, "64x256": 32, "llama-tiny": 21, "llama-30m": 57, "llama-953m": 147,
    }  # fmt: skip
    assert ((5632, 2048), 32) in llama(16, 2048, 32000)


def test_parameters_and_gradients_are_reproducible(tiny):
    values = make_parameters(tiny, "cpu")
    assert len(values) == 6
    for one, other in zip(make_gradients(values, 3), make_gradients(values, 3), strict=True):
        assert one.equal(other)


def test_mistakes_are_refused(capsys):
    for words in (["--threads", "0"], ["--cases", "nothing"], ["--solvers", "nothing"]):
        with pytest.raises(SystemExit):
            main(words)
    assert "nothing" in capsys.readouterr().err
