import shutil

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from experiments.main import main
from experiments.metrics import read_metrics
from experiments.settings import SettingsError, dtype_of
from tests.experiments.test_train import losses, tensors
from tests.processes import run_experiments

UNSUPPORTED = "is not in the embedded base"


def train_together(words, folder):
    """Run `python -m experiments train` on two ranks into a folder, which is returned."""
    folder.mkdir(exist_ok=True)
    ended = run_experiments(2, ["train", *words, f"output_dir={folder}"], folder)
    errors = "\n".join(one.error for one in ended)
    if UNSUPPORTED in errors:
        pytest.skip("the embedded base lacks this parallelism")
    assert [one.status for one in ended] == [0, 0], errors
    return folder


@pytest.fixture
def words(tiny):
    # A large epsilon: without it the few gradients so far leave the factor matrices singular, and
    # their roots would blow fp32 rounding up to 1e-3 of the loss.
    return [
        *tiny,
        "optimizer=dash",
        "optimizer.lr=0.01",
        "optimizer.precondition_frequency=2",
        "optimizer.epsilon=1e-4",
        "precision=fp64",
        "steps=6",
    ]


def check_same_losses(folder, other):
    one, two = losses(folder), losses(other)
    assert [x[:2] for x in one] == [x[:2] for x in two]
    # The factor matrices and the communication are fp32.
    assert [x[2] for x in one] == pytest.approx([x[2] for x in two], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
def test_a_run_of_two_processes_continues_exactly(strategy, words, tmp_path):
    straight, continued = tmp_path / "straight", tmp_path / "continued"
    own = [*words, f"parallelism={strategy}"]
    train_together([*own, "checkpoint_every=3"], straight)
    shutil.copytree(straight, continued)
    shutil.rmtree(continued / "checkpoints" / "step_00000006")
    train_together([*own, "micro_batch_size=2", "resume=always"], continued)
    assert losses(straight) == losses(continued)
    events = [r["event"] for r in read_metrics(continued / "metrics.jsonl")]
    assert events.count("resume") == 1

    states = []
    for folder in (straight, continued):
        dcp_to_torch_save(folder / "checkpoints/step_00000006/shards", folder / "whole.pt")
        # Written a moment ago by ourselves; not all that DCP keeps beside tensors is plain.
        states.append(dict(tensors(torch.load(folder / "whole.pt", weights_only=False))))
    assert states[0].keys() == states[1].keys()
    assert any("factor_matrices" in key for key in states[0])
    different = [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]
    assert different == []

    if strategy == "ddp":  # FSDP2 preconditions shards of the parameters: other matrices
        assert main(["train", *words, f"output_dir={tmp_path / 'alone'}"]) == 0
        check_same_losses(tmp_path / "alone", straight)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["cut off", "overwritten"])
def test_a_damaged_checkpoint_of_two_processes_gives_way_to_the_one_before(how, words, tmp_path):
    own = [*words, "parallelism=ddp", "checkpoint_every=2"]
    train_together(own, tmp_path)
    before = losses(tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000006"
    shard = max((newest / "shards").iterdir(), key=lambda path: path.name)  # the second process's
    content = shard.read_bytes()
    shard.write_bytes(content[:-100] if how == "cut off" else b"?" * len(content))
    train_together(own, tmp_path)
    assert losses(tmp_path) == before
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "resume"] == [4]
    assert newest.with_name("damaged_step_00000006").is_dir()


@pytest.mark.distributed
def test_two_replicas_do_what_one_process_does(words, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    own = [*words, "parallelism=hybrid_shard", "micro_batch_size=1"]
    train_together(own, together)
    assert main(["train", *words, f"output_dir={alone}"]) == 0
    check_same_losses(alone, together)


@pytest.mark.distributed
def test_shards_in_bf16_train_and_tell_of_the_blocks_of_all_processes(words, tmp_path):
    own = ["parallelism=fully_shard", "parallelism.param_dtype=bfloat16", "precision=fp32"]
    own += ["parallelism.reduce_dtype=float32", "diagnose_every=4", "sample_prompts=[a]"]
    train_together([*words, *own, "steps=4"], tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    (found,) = [r for r in records if r["event"] == "diagnostics"]
    by_name = [block["parameter"] for block in found["blocks"]]
    assert by_name.count("blocks.0.attention.query.weight") == 2  # a shard of each process
    assert sum(r["event"] == "sample" for r in records) == 3
    values = [x[2] for x in losses(tmp_path)]
    assert values[-1] < values[0]
    # Rounded to bf16: the first loss is another than that in fp32.
    assert main(["train", *words, "precision=fp32", "steps=1", f"output_dir={tmp_path / 'o'}"]) == 0
    assert values[0] != losses(tmp_path / "o")[0][2]


def test_an_unknown_dtype_is_named():
    with pytest.raises(SettingsError, match="param_dtype=half must be one of float16, bfloat16"):
        dtype_of("half", "parallelism.param_dtype")


def test_torchrun_needs_a_parallelism(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", *tiny, f"output_dir={tmp_path}"]) == 2
    assert "torchrun started 2 processes. Choose parallelism=ddp" in capsys.readouterr().err


def test_an_unsharded_checkpoint_is_refused_by_several_processes(tmp_path, monkeypatch):
    from experiments import checkpoint

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(tmp_path, 1, model, optimizer, {})
    assert checkpoint.read(path)["step"] == 1
    monkeypatch.setattr(checkpoint, "_is_distributed", lambda: True)
    with pytest.raises(ValueError, match="was written without"):
        checkpoint.read(path)
