import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import dash_shampoo
from experiments.main import COMMANDS, main
from experiments.parallel import build
from experiments.settings import (
    TRAIN_GROUPS,
    SettingsError,
    TrainSettings,
    compose_train,
    config_dir,
    options,
    train_settings,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_yaml_and_the_dataclass_agree():
    config = compose_train([])
    assert {f.name for f in fields(TrainSettings)} == set(config) - {*TRAIN_GROUPS, "choices"}
    assert train_settings(config) == TrainSettings()
    assert config.choices.optimizer == "dash_default"


@pytest.mark.parametrize("group", TRAIN_GROUPS)
def test_each_option_of_each_group_composes(group):
    names = options(group)
    assert names == sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    assert names
    for name in names:
        config = compose_train([f"{group}={name}"])
        assert config.choices[group] == name
        train_settings(config)


def test_configs_are_those_of_the_checkout():
    assert config_dir() == CONFIGS


BAD = [
    ("stpes=3", "There is no setting 'stpes'. Did you mean steps"),
    ("optimizer=adamv", "There is no optimizer=adamv. Available: adamw, "),
    ("optimizer.lrr=4", "There is no setting 'optimizer.lrr'. Did you mean optimizer.lr"),
    ("optimzer=adamw", "There is no setting 'optimzer'. Did you mean optimizer"),
    ("experiment=none", "There is no experiment=none. Available: demo"),
    ("steps", "'steps' is not of the form key=value"),
    ("steps=[1", "'steps=[1' is not of the form key=value"),
    ("steps=many", "steps: Value 'many' of type 'str' could not be converted to Integer"),
    ("steps=0", "steps=0 must be at least 1"),
    ("checkpoint_every=-1", "checkpoint_every=-1 must be at least 0"),
    ("precision=fp8", "precision=fp8 must be one of fp32, fp64, bf16"),
    ("resume=perhaps", "resume=perhaps must be one of auto, true, false"),
    ("micro_batch_size=3", "micro_batch_size=3 must be a divisor of batch_size"),
    ("clip_grad_norm=0", "clip_grad_norm=0.0 must be > 0 or null"),
    ("schedule.warmup_fraction=1.5", "schedule.warmup_fraction=1.5 must be in [0, 1]"),
    ("device=cuba", "device=cuba"),
    ("parallelism=ddp", "parallelism=ddp needs torchrun"),
    ("data=token_files", "data.train must be given: data.train=..."),
    ("model.num_heads=3", "model.width=128 can't be split into model.num_heads=3 heads"),
    ("optimizer._target_=torch.optim.Nothing", "optimizer: Error loading 'torch.optim.Nothing'"),
    ("optimizer._target_=torch.nn.Linear", "optimizer"),
    ("optimizer.lr=-1", "optimizer: Invalid"),
    ("+optimizer.nonsense=1", "nonsense"),
]


@pytest.mark.parametrize(("word", "message"), BAD, ids=[word for word, _ in BAD])
def test_a_mistake_is_told_in_one_line(word, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "device=cpu", "steps=1", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments: error: ")
    assert message in error
    assert error.count("\n") <= 4  # Hydra's own message about a target has three lines


def test_the_default_is_spelled_out_as_it_is():
    node = compose_train(["optimizer=dash_default"]).optimizer.preconditioner_config
    assert build(node, "preconditioner_config") == dash_shampoo.DefaultDashConfig


def test_two_mistakes_name_one_of_them():
    with pytest.raises(SettingsError, match="'a'"):
        compose_train(["a=1", "b=2"])


def test_own_yaml_files(tmp_path, capsys):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text(
        "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.5\n"
    )
    assert options("optimizer", tmp_path) == sorted([*options("optimizer"), "mine"])
    words = ["train", "optimizer=mine", "--cfg", "job", "--config-dir"]
    assert main([*words, str(tmp_path)]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.optimizer.lr == 0.5
    assert printed.optimizer._target_ == "torch.optim.SGD"
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_names_of_dtypes_and_enums(tmp_path, capsys):
    config = compose_train(["parallelism=hybrid_shard"])
    assert str(config.parallelism.distributed_config.communication_dtype) == "torch.float32"
    assert config.optimizer.weight_decay_type.name == "DECOUPLED"
    words = ["train", "device=cpu", f"output_dir={tmp_path}"]
    assert main([*words, "optimizer.weight_decay_type=${weight_decay_type:SOME}"]) == 2
    assert "DECOUPLED" in capsys.readouterr().err


def test_printing_the_configuration_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "optimizer=adamw", "steps=7", "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.steps, printed.choices.optimizer) == (7, "adamw")
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
    assert all(name in text for group in TRAIN_GROUPS for name in options(group)[:2])
    assert "warmup_fraction" in text
    assert main(["nothing"]) == 2
    assert f"one of {', '.join(COMMANDS)}." in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_a_missing_extra_says_what_to_install():
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
