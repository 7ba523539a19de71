import sys
from types import ModuleType

import pytest

from experiments.main import main
from experiments.metrics import read_metrics


class Recorder:
    """Stands in for both packages: keeps what it is given."""

    def __init__(self, *arguments, **keywords):
        self.arguments, self.keywords = arguments, keywords
        self.logged, self.is_open = [], True

    def add_scalar(self, name, value, step):
        self.logged.append((name, value, step))

    def add_text(self, name, text):
        self.text = text

    def log(self, values, step):
        self.logged += [(name, value, step) for name, value in values.items()]

    def close(self):
        self.is_open = False

    finish = close


@pytest.fixture
def recorders(monkeypatch):
    made = []

    def make(*arguments, **keywords):
        made.append(Recorder(*arguments, **keywords))
        return made[-1]

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter, wandb.init = make, make
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return made


def test_the_sinks_get_what_is_in_the_file(tiny, tmp_path, recorders):
    words = [
        *tiny,
        "optimizer=dash",
        "steps=2",
        "sinks=[tensorboard,wandb]",
        f"output_dir={tmp_path}",
    ]
    assert main(["train", *words]) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    expected = {
        (f"{r['event']}/loss", r["loss"], r["step"]) for r in records if r["event"] != "start"
    }
    assert len(expected) == 4
    board, wandb = recorders
    assert board.arguments == (str(tmp_path / "tensorboard"),)
    assert wandb.keywords["config"]["steps"] == 2
    for one in recorders:
        assert expected <= set(one.logged)
        assert ("validation/failures", 0.0, 2) in one.logged
        assert all(isinstance(value, float) for _, value, _ in one.logged)
        assert not one.is_open
    named = {name: value for name, value, step in wandb.logged if step == 2}
    assert named["elapsed/opt_step"] == named["train/optimizer_ms"] > 0
    assert {"elapsed/fw_step", "elapsed/bw_step"} <= set(named)


def test_mistakes_are_named(tiny, tmp_path, monkeypatch, capsys):
    words = ["train", *tiny, "optimizer=adamw", "steps=1", f"output_dir={tmp_path}"]
    assert main([*words, "sinks=[paper]"]) == 2
    assert "sinks=paper must be one of tensorboard, wandb" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*words, "sinks=[wandb]"]) == 2
    assert "sinks=wandb needs the package wandb: pip install wandb" in capsys.readouterr().err
