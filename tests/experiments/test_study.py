import json
import math
from dataclasses import replace

import pytest
import torch

import dash_shampoo as ds
from experiments.main import main
from experiments.study import runs
from experiments.study.questions import QUESTIONS, TASKS, Question, Training, squares
from experiments.study.runs import Store, known_result, result, tune
from experiments.study.sides import AdamW, Muon, Shampoo, digest
from experiments.tasks import LlamaTask, fit


def tiny(_):
    return LlamaTask(steps=15, width=16, sequence_length=16, num_layers=1, batch_size=4)


@pytest.fixture
def tiny_study(monkeypatch):
    """One task of a second, one question with three sides."""
    monkeypatch.setattr(runs, "_VALIDATIONS", 3)
    monkeypatch.setitem(TASKS, "tiny", Training("a tiny Llama", tiny, 16))
    sides = {"AdamW": AdamW(), "Muon": Muon(), "Shampoo": Shampoo(squares(5))}
    monkeypatch.setitem(QUESTIONS, "tiny", Question("Which is best?", sides, ("tiny",)))


def test_the_learning_rate_has_worse_neighbours():
    asked_for = []

    def loss(lr):
        asked_for.append(lr)
        return (math.log2(lr) - 3.2) ** 2

    assert tune(loss, 1.0) == 8.0
    assert asked_for == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    # What always gets better ends somewhere, and what diverges is not chosen.
    assert tune(lambda lr: -lr, 1.0) == 32.0
    assert tune(lambda lr: math.inf if lr > 1.0 else -lr, 1.0) == 1.0


def test_equal_sides_are_the_same_runs_and_others_are_not():
    side = Shampoo(squares(5))
    assert digest(side) == digest(Shampoo(squares(5)))
    others = [
        Shampoo(squares(4)),
        Shampoo(squares(5, exponent=0.25)),
        replace(side, frequency=10),
        replace(side, routing="all"),
        Shampoo(replace(squares(5), safety=None)),
        AdamW(),
    ]
    assert len({digest(one) for one in [side, *others]}) == len(others) + 1


def test_a_side_is_tuned_with_some_seeds_and_judged_by_others(tmp_path, tiny_study, monkeypatch):
    store = Store(tmp_path / "runs.jsonl")
    one = result(store, "tiny", "AdamW", AdamW(), seeds=[1, 2], tuning_seeds=[0, 3])
    records = [json.loads(line) for line in store.path.read_text().splitlines()]
    tuned: dict[float, list[float]] = {}
    for r in records:
        if r["seed"] in (0, 3):
            tuned.setdefault(r["lr"], []).append(r["losses"][-1])
    assert all(len(losses) == 2 for losses in tuned.values())
    assert one.lr == min(tuned, key=lambda lr: sum(tuned[lr]))
    judged = [r for r in records if r["seed"] in (1, 2)]
    assert {r["lr"] for r in judged} == {one.lr}
    assert one.losses == [r["losses"][-1] for r in judged]
    assert all(a < b for a, b in zip(one.fits[0].seconds, one.fits[0].seconds[1:], strict=False))
    assert one.fits[0].optimizer_seconds < one.seconds
    # Done runs are read back, not done again.
    again = Store(store.path)
    monkeypatch.setattr(runs, "fit", None)
    assert result(again, "tiny", "AdamW", AdamW(), [1, 2], [0, 3]).losses == one.losses
    assert known_result(again, "tiny", AdamW(), [1, 2, 4], [0, 3]) is None


def test_a_divergence_is_a_result(tmp_path, tiny_study):
    store = Store(tmp_path / "runs.jsonl")
    assert store.run("tiny", "SGD", _Exploding(), 1e30, 0).loss == math.inf
    assert Store(store.path).find("tiny", _Exploding(), 1e30, 0).loss == math.inf


class _Exploding:
    lr, as_matrices = 1.0, False

    def __repr__(self):
        return "exploding"

    def build(self, model, lr, block):
        return torch.optim.SGD(model.parameters(), lr=lr)


def test_a_study_is_one_command_that_goes_on(tmp_path, tiny_study, monkeypatch, capsys):
    words = ["study", "tiny", "--tasks", "tiny", "--seeds", "1", "2", "--output-dir", str(tmp_path)]
    assert main(words) == 0
    page = (tmp_path / "README.md").read_text()
    assert "## Which is best?" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows if "±" in row] == ["AdamW", "Muon", "Shampoo"]
    assert sum("**" in row for row in rows) == 1  # the best
    assert (tmp_path / "tiny.png").stat().st_size > 10_000
    count = len((tmp_path / "runs.jsonl").read_text().splitlines())
    assert main([*words, "--sides", "Muon"]) == 0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == count
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "unknown question 'nothing'"),
        (["--tasks", "nothing"], "unknown task 'nothing'"),
        (["--seeds", "0"], "--tuning-seeds 0 must not be one of --seeds"),
        (["--sides", "nothing"], "no side's name contains 'nothing'"),
    ],
)
def test_wrong_words_are_told(words, said, capsys):
    assert main(["study", *words]) == 2
    assert said in capsys.readouterr().err


def sides():
    return [
        pytest.param(side, task, id=f"{name}-{label}")
        for name, question in QUESTIONS.items()
        for label, side in question.sides.items()
        for task in question.tasks[:1]
    ]


@pytest.mark.parametrize(("side", "task"), sides())
def test_every_side_takes_a_step(side, task, monkeypatch):
    if isinstance(side, Shampoo) and not side.stacked:
        wants_meta = not isinstance(side.config, ds.RootInvShampooPreconditionerConfig)
        if wants_meta and ds.DistributedShampoo.__module__.startswith("dash_shampoo."):
            pytest.skip("only Meta's own class has this list")
    pytest.importorskip("sklearn" if task in ("mlp", "conv2d") else "mnist1d")
    made = TASKS[task].make(side.as_matrices)
    monkeypatch.setattr(made, "steps", 3, raising=False)
    done = fit(made, lambda model: side.build(model, side.lr, TASKS[task].block), seed=0)
    assert math.isfinite(done.loss)


def test_questions_have_sides_that_differ():
    for question in QUESTIONS.values():
        assert len({digest(side) for side in question.sides.values()}) == len(question.sides)
        assert set(question.tasks) <= set(TASKS)
