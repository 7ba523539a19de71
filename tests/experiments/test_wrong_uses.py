"""Every command's wrong use ends in one sentence that says what to do."""

import pytest

from experiments.main import COMMANDS, main

WRONG = {
    "trian": "unknown command 'trian'; one of train, ",
    "--steps 3": "'--steps' comes before a command",
    "train --steps 3": "train has no option --steps. Settings are given as KEY=VALUE",
    "train --multirum": "train has no option --multirum. Did you mean --multirun",
    "train steps": "'steps' is not of the form key=value",
    "train model=null": "Config group override must be a string or a list",
    "train optimizer=adamm": "Could not find 'optimizer/adamm'. Available options",
    "train data.train=/nowhere": "data.train: no file matches '/nowhere'",
    "train device=tpu": "device=tpu",
    "train schedule.warmup_fraction=half": "schedule.warmup_fraction=half must be in [0, 1]",
    "train schedule=cosine_restarts schedule.cycles=1.5": "schedule.cycles=1.5 must be a whole number",
    "train schedule._partial_=5": "schedule: Instantiation: _partial_ flag must be a bool",
    "train parameter_groups.rules=5": "parameter_groups.rules=5 must map names to",
    "train model.num_layers=-1": "model.num_layers=-1 must be at least 1",
    "plan data.vocab_size=many": "data.vocab_size=many must be a whole number",
    "classify schedule.warmup_fraction=2": "schedule.warmup_fraction=2 must be in [0, 1]",
    "train schedule.warmup_fraction=2": "schedule.warmup_fraction=2 must be in [0, 1]",
    "train resume_from=/nowhere": "resume_from=/nowhere: there is no checkpoint",
    "sweep steps=1,2": "output_dir=... must be given",
    "sweep --workers 0 output_dir=x": "--workers=0 must be at least 1",
    "plan hardware=B300": "hardware=B300 must be one of A100, H100, H200",
    "demo runs=null": "runs is empty",
    "report": "the following arguments are required: RUNS",
    "data text": "the following arguments are required: files, --out",
    "bench --blocks 0": "argument --blocks: 0 must be a whole number of at least 1",
    "paper --only best": "--only best: one of base, layer_wise, whole",
    "from-dash python": "the command line does not call main.py",
    "from-meta python": "the command line does not call cifar10_example",
    "classify images=cifar": "Could not find 'images/cifar'. Available options",
    "classify epochs=0": "epochs=0 must be at least 1",
    "train model.tie_embeddings=abc": "model.tie_embeddings=abc must be true or false",
    "train optimizer.use_bias_correction=abc": "optimizer.use_bias_correction=abc must be true or",
    "train peak_tflops=-1": "peak_tflops=-1.0 must be > 0 or null",
    "plan optimizer.weight_decay_type=abc": "Invalid weight_decay_type='abc': must be one of",
    "plan optimizer.lr=-1": "Invalid lr=-1",
    "study --tsaks x": "--tsaks",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_use_ends_in_one_sentence(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("experiments: error: ")
    assert captured.err.count("\n") == 1
    assert WRONG[line] in captured.err


def test_no_command_is_left_out():
    assert {line.split()[0] for line in WRONG} >= set(COMMANDS)
