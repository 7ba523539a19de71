import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from experiments import settings
from experiments.composition import plain
from experiments.main import COMMANDS, main
from experiments.runs import leaves
from tests.experiments.composing import CONFIGS, composed, options

GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def test_there_are_groups():
    assert {"optimizer", "solver", "model", "data", "schedule", "experiment"} <= set(GROUPS)
    assert {"train.yaml", "demo.yaml", "plan.yaml"} <= {p.name for p in CONFIGS.iterdir()}


@pytest.mark.parametrize("group", GROUPS)
def test_each_option_of_each_group_composes(group):
    assert options(group)
    for name in options(group):
        command = "classify" if group == "images" else "train"
        assert plain(composed([f"{group}={name}"], command))["seed"] > 0


@pytest.mark.parametrize(
    "schema",
    [
        settings.TrainSettings,
        settings.DemoSettings,
        settings.ClassifySettings,
        settings.PlanSettings,
    ],
)
def test_each_setting_is_explained_and_none_is_given_twice(schema):
    """A default of the dataclass that a YAML file repeats would be one too many."""
    text = "".join(c.__doc__ for c in schema.__mro__[:-1])
    command = schema.__name__.removesuffix("Settings").lower()
    again = OmegaConf.load(CONFIGS / f"{command}.yaml")
    for field in fields(schema):
        if field.name not in GROUPS:
            assert re.search(rf"(?m)^ {{8}}{field.name}: \w", text), field.name
        if field.name in again:
            assert again[field.name] != field.default


BAD = [
    ("stpes=3", "Key 'stpes' not in 'TrainSettings'. Did you mean steps?"),
    (
        "optimizer=adamv",
        "Could not find 'optimizer/adamv'. Available options in 'optimizer': adam ",
    ),
    ("optimizer.lrr=4", "Could not override 'optimizer.lrr'. To append to your config use"),
    ("optimzer=adamw", "Did you mean optimizer?"),
    (
        "experiment=none",
        "Could not find 'experiment/none'. Available options in 'experiment': demo",
    ),
    ("steps", "'steps' is not of the form key=value"),
    ("steps=[1", "'steps=[1' is not of the form key=value"),
    ("steps=many", "steps=many. Value 'many' of type 'str' could not be converted to Integer"),
    ("steps=0", "steps=0 must be at least 1"),
    ("checkpoint_every=-1", "checkpoint_every=-1 must be at least 0"),
    ("precision=fp8", "precision=fp8. Invalid value 'fp8', expected one of [fp32, fp64, bf16]"),
    ("resume=perhaps", "Invalid value 'perhaps', expected one of [auto, always, never]"),
    ("micro_batch_size=3", "micro_batch_size=3 must be a divisor of batch_size"),
    ("clip_grad_norm=0", "clip_grad_norm=0.0 must be > 0 or null"),
    ("schedule.warmup_fraction=1.5", "schedule.warmup_fraction=1.5 must be in [0, 1]"),
    ("schedule=none", "Could not find 'schedule/none'. Available options in 'schedule': "),
    ("device=cuba", "device=cuba"),
    ("parallelism=ddp", "parallelism=ddp needs torchrun"),
    ("data=token_files", "data.train must be given: data.train=..."),
    ("model.num_heads=3", "model.width=128 can't be split into model.num_heads=3 heads"),
    ("optimizer._target_=torch.optim.Nothing", "optimizer: Error loading 'torch.optim.Nothing'"),
    ("optimizer._target_=torch.nn.Linear", "optimizer"),
    ("optimizer.lr=-1", "optimizer: Invalid"),
    ("+optimizer.nonsense=1", "nonsense"),
    ("solver=newton_db", "optimizer=dash_default has no use for a solver; optimizer=dash has"),
    ("solver.epsilon=1", "optimizer=dash_default has no use for a solver"),
    ("optimizer.weight_decay_type=${weight_decay_type:SOME}", "unknown name; one of L2, DECOUPLED"),
]


@pytest.mark.parametrize(("word", "message"), BAD, ids=[word for word, _ in BAD])
def test_a_mistake_is_told_in_one_line(word, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "device=cpu", "steps=1", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments: error: ")
    assert message in error
    assert error.count("\n") <= 4  # Hydra's own message about a target has three lines
    # A name that exists is not what was meant instead.
    assert f"Did you mean {word.partition('=')[0]}?" not in error


def test_two_mistakes_name_one_of_them(capsys):
    assert main(["train", "a=1", "b=2"]) == 2
    assert "'a'" in capsys.readouterr().err


def test_own_yaml_files(tmp_path, capsys):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text(
        "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.5\n"
    )
    words = ["train", "optimizer=mine", "--cfg", "job", "--config-dir"]
    assert main([*words, str(tmp_path)]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.optimizer.lr == 0.5
    assert printed.optimizer._target_ == "torch.optim.SGD"
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "not found" in capsys.readouterr().err


def test_beta2_is_written_once():
    """Who sets `optimizer.betas` sets that of the grafting, and of groups with one of their own."""
    names = [
        name
        for name in options("optimizer")
        if "betas" in composed([f"optimizer={name}"]).optimizer
    ]
    for groups in options("parameter_groups"):
        found = []
        for name in names:
            words = [f"optimizer={name}", f"parameter_groups={groups}"]
            config = composed([*words, "optimizer.betas=[0.9,0.123]"])
            for part in ("optimizer", "parameter_groups"):
                values = OmegaConf.to_container(config[part], resolve=True)
                found += [value for key, value in leaves(values) if key.endswith(".beta2")]
        assert len(found) >= 3
        assert set(found) == {0.123}


def test_names_of_dtypes_and_enums():
    config = composed(["parallelism=hybrid_shard"])
    assert str(config.parallelism.distributed_config.communication_dtype) == "torch.float32"
    assert config.optimizer.weight_decay_type.name == "DECOUPLED"


def test_printing_the_configuration_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "optimizer=adamw", "steps=7", "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.steps, printed.optimizer._target_) == (7, "torch.optim.AdamW")
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: python -m experiments {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for group in GROUPS for name in options(group)[:2])
    assert "warmup_fraction" in text
    assert main(["nothing"]) == 2
    assert f"one of {', '.join(COMMANDS)}." in capsys.readouterr().err


def test_several_runs_at_once(tiny, tmp_path, capsys):
    words = [*tiny, "steps=1", "optimizer=adamw,muon", f"output_dir={tmp_path}", "--multirun"]
    assert main(["train", *words]) == 0
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["optimizer=adamw", "optimizer=muon"]
    # One that fails leaves the others be, and is told by the status.
    words = [*tiny, "steps=0,2", "optimizer=adamw", f"output_dir={tmp_path / 'more'}", "-m"]
    assert main(["train", *words]) == 2
    assert "steps=0 must be at least 1" in capsys.readouterr().err
    assert (tmp_path / "more" / "steps=2" / "metrics.jsonl").is_file()


def test_what_is_missing_says_what_to_install():
    modules = ["hydra", "tqdm", "matplotlib"]
    code = (
        "import sys\n"
        "from experiments.main import main\n"
        f"for module in {modules}:\n"
        "    sys.modules[module] = None\n"
        "    assert main([]) == 0\n"
        "    assert main(['demo']) == 2\n"
        "    del sys.modules[module]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    for module in modules:
        assert f"the module {module} is missing: pip install -e '.[dev]'" in done.stderr
