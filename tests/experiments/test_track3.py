import re

import numpy as np
import pytest

from experiments.main import main
from experiments.metrics import FILE_NAME, read_metrics
from tests.experiments.composing import composed

SMALL = [
    "data.vocab_size=64",
    "model.num_layers=1",
    "model.width=16",
    "model.num_heads=2",
    "optimizer.max_preconditioner_dim=16",
    "optimizer.lr=0.03",
    "batch_size=4",
    "micro_batch_size=2",
    "sequence_length=16",
    "validation_batches=2",
    "evaluate_every=20",
    "log_every=1",
    "checkpoint_every=0",
    "steps=60",
    "compile=false",
    "device=cpu",
    "progress=false",
]


@pytest.fixture
def shards(tmp_path):
    """Two training shards and one of validation with the track's header: a walk round 64 tokens."""
    for name, length in [("train_000001", 4000), ("train_000002", 3000), ("val_000000", 2000)]:
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, length
        tokens = (np.arange(length) * 5 % 64).astype("<u2")
        (tmp_path / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    return [
        f"data.train={tmp_path}/fineweb_train_*.bin",
        f"data.validation={tmp_path}/fineweb_val_*.bin",
    ]


def test_it_has_the_tracks_batch_and_validation():
    config = composed(["experiment=nanogpt_track3", "data.train=x", "data.validation=y"])
    assert config.batch_size * config.sequence_length == 524_288
    assert config.validation_batches * config.batch_size * config.sequence_length == 10_485_760
    assert (config.optimizer.betas[1], config.optimizer.precondition_frequency) == (0.9, 1)


def test_it_trains_at_a_small_size(shards, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["experiment=nanogpt_track3", *shards, *SMALL, f"output_dir={folder}"]
    assert main(["train", *words]) == 0
    groups = re.findall(r"group \d, .*", capsys.readouterr().out)
    assert ["head.weight" in group for group in groups] == [False, True]  # by Adam
    validations = [
        r["loss"] for r in read_metrics(folder / FILE_NAME) if r["event"] == "validation"
    ]
    assert validations[-1] < 0.6 * validations[0]
