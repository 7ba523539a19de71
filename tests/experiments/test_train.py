import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import dash_shampoo
from experiments import checkpoint
from experiments.main import main
from experiments.metrics import MetricsFile, read_metrics
from tests.experiments.composing import composed, options

TRAIN_KEYS = {
    "event", "step", "loss", "lr", "grad_norm", "data_ms", "forward_ms", "backward_ms", "clip_ms",
    "optimizer_ms", "tokens_per_second", "mfu", "peak_memory_mib", "seconds", "tokens",
}  # fmt: skip
VALIDATION_KEYS = {"event", "step", "loss", "perplexity", "accuracy", "seconds", "tokens"}
OPTIMIZERS = options("optimizer")
SOLVERS = options("solver")


def train(words, folder):
    return main(["train", *words, f"output_dir={folder}"])


def newest(folder):
    return next(iter(checkpoint.newest_first(folder / "checkpoints")), None)


def state_of(folder):
    return checkpoint.read(newest(folder))


def tensors(node, prefix=""):
    """Path and tensor of everything in nested dicts and lists."""
    if isinstance(node, torch.Tensor):
        yield prefix, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from tensors(value, f"{prefix}/{key}")
    elif isinstance(node, list | tuple):
        for key, value in enumerate(node):
            yield from tensors(value, f"{prefix}/{key}")


def losses(folder):
    """Every loss in the order of the file, without the times."""
    records = read_metrics(folder / "metrics.jsonl")
    return [(r["event"], r["step"], r["loss"]) for r in records if "loss" in r]


def test_there_are_optimizers():
    assert {"adamw", "distributed_shampoo", "dash", "dash_default", "muon"} <= set(OPTIMIZERS)
    assert {"eigen", "newton_db", "minimax"} <= set(SOLVERS)


@pytest.mark.parametrize(
    "chosen",
    [*(f"optimizer={name}" for name in OPTIMIZERS), *(f"solver={name}" for name in SOLVERS)],
)
def test_each_optimizer_and_solver_trains(chosen, tiny, tmp_path):
    if chosen == "optimizer=soap":
        pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    words = [*tiny, "optimizer=dash", chosen, "optimizer.lr=0.02", "steps=4"]
    assert train(words, tmp_path) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    curve = [r["loss"] for r in records if r["event"] == "validation"]
    assert len(curve) == 3
    assert curve[-1] < curve[0] - 0.1


def test_the_damping_and_frequency_come_with_the_solver():
    for name in SOLVERS:
        config = composed(["optimizer=dash", f"solver={name}"])
        assert config.optimizer.epsilon == config.solver.epsilon
        assert config.optimizer.precondition_frequency == config.solver.precondition_frequency
        chosen = config.optimizer.preconditioner_config.amortized_computation_config
        assert chosen == config.solver.config
    own = composed(["optimizer=dash", "solver=newton_db", "optimizer.epsilon=1e-3"]).optimizer
    assert own.epsilon == 1e-3


def test_eigen_gives_the_same_curve_in_both_classes(tiny, tmp_path):
    words = [*tiny, "steps=4", "precision=fp64", "optimizer.lr=0.01"]
    for name in ("distributed_shampoo", "dash"):
        assert train([*words, f"optimizer={name}"], tmp_path / name) == 0
    one, other = (losses(tmp_path / name) for name in ("distributed_shampoo", "dash"))
    # The factor matrices are fp32 in both, so the batched products differ by fp32 rounding.
    assert [x[2] for x in one] == pytest.approx([x[2] for x in other], rel=1e-4)


def test_metrics_schema(tiny, tmp_path):
    words = [*tiny, "optimizer=dash", "steps=5", "optimizer.lr=0.01"]
    assert train(words, tmp_path) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    start = records[0]
    assert start["event"] == "start"
    assert {"dash_shampoo", "torch", "device", "data_digest", "parameters", "config"} <= set(start)
    assert start["config"]["optimizer"]["lr"] == 0.01
    steps = [r for r in records if r["event"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert all(set(r) == TRAIN_KEYS for r in steps)
    assert [r["tokens"] for r in steps] == [64 * i for i in range(1, 6)]
    spent = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(steps)]
    rates = [64 / seconds for seconds in spent]
    assert [r["tokens_per_second"] for r in steps[1:]] == pytest.approx(rates)
    seconds = [r["seconds"] for r in steps]
    assert seconds == sorted(seconds)
    for r in steps:
        assert min(r["forward_ms"], r["backward_ms"], r["optimizer_ms"]) > 0
        assert r["peak_memory_mib"] > 10
    validations = [r for r in records if r["event"] == "validation"]
    assert [r["step"] for r in validations] == [0, 2, 4, 5]
    assert all(set(r) == VALIDATION_KEYS | {"failures"} for r in validations)
    assert validations[-1]["failures"] == {}
    for r in validations:
        assert r["perplexity"] == pytest.approx(math.exp(r["loss"]))
    # An untrained model knows nothing: ln 256, and what its random weights add.
    assert validations[0]["loss"] == pytest.approx(math.log(256), abs=0.1)


def test_log_every_thins_the_records_out(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=7", "log_every=3", "evaluate_every=0"]
    assert train(words, tmp_path) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["event"], r.get("step")) for r in records] == [
        ("start", None), ("validation", 0), ("train", 3), ("train", 6), ("train", 7),
        ("validation", 7),
    ]  # fmt: skip


def test_optimizers_see_the_same_first_loss(tiny, tmp_path):
    first = set()
    for name in ("adamw", "dash"):
        train([*tiny, f"optimizer={name}", "steps=1"], tmp_path / name)
        first.add(losses(tmp_path / name)[1])
    assert len(first) == 1


def test_micro_batches_add_up(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=3", "precision=fp64"]
    train(words, tmp_path / "whole")
    train([*words, "micro_batch_size=1"], tmp_path / "pieces")
    whole, pieces = (dict(tensors(state_of(tmp_path / k)["model"])) for k in ("whole", "pieces"))
    for name, weight in whole.items():
        # Adam divides by the gradient's own size: 1e-16 of rounding can become 1e-9.
        torch.testing.assert_close(weight, pieces[name], rtol=1e-7, atol=1e-9)


def test_embeddings_and_norms_can_go_the_way_of_adam(tiny, tmp_path, capsys):
    words = [*tiny, "optimizer=dash", "steps=3", "parameter_groups=adam_for_embeddings"]
    assert train(words, tmp_path / "split") == 0
    groups = state_of(tmp_path / "split")["optimizer"]["param_groups"]
    printed = capsys.readouterr().out
    assert re.search(
        r"group 0, [\d,]+ scalars, lr \S+: blocks\.\*\.attention\.query\.weight", printed
    )
    assert "embedding.weight, blocks.*.attention_norm.weight" in printed
    names = [set(group["param_names"]) for group in groups]
    assert all(name.startswith("blocks.0.") and "norm" not in name for name in names[0])
    assert {"embedding.weight", "head.weight", "norm.weight"} <= names[1]
    assert len(names[0]) == 7
    assert len(names[1]) == 5
    state = state_of(tmp_path / "split")["optimizer"]["state"]
    # By index: the first group's are 0 to 6.
    roots = {k for k, v in state.items() if any("factor_matrices" in p for p, _ in tensors(v))}
    assert roots == set(range(7))

    rule = "parameter_groups.rules.adam"
    assert train([*words, f"+{rule}.options.lr=0.5"], tmp_path / "rate") == 0
    rates = [g["lr"] for g in state_of(tmp_path / "rate")["optimizer"]["param_groups"]]
    assert rates[1] == pytest.approx(500 * rates[0])
    assert train([*words, f"{rule}.match=nothing"], tmp_path / "none") == 2
    assert f"{rule}.match=nothing matches no parameter" in capsys.readouterr().err
    other = "+parameter_groups.rules.other={match: head, options: {}}"
    assert train([*words, other], tmp_path / "twice") == 2
    assert "rules.other takes head.weight, which an earlier rule took" in capsys.readouterr().err


RESUMED = [
    (["optimizer=adamw"], "fp32"),
    (["optimizer=muon"], "fp32"),
    (["optimizer=distributed_shampoo"], "fp32"),
    (["optimizer=dash"], "fp32"),
    (["optimizer=dash"], "fp64"),
    (["optimizer=dash", "solver=newton_db"], "fp32"),
    (["optimizer=dash_default"], "fp32"),
]


@pytest.mark.parametrize(("chosen", "precision"), RESUMED)
def test_a_continued_run_is_bitwise_the_straight_one(chosen, precision, tiny, tmp_path):
    words = [*tiny, *chosen, "optimizer.lr=0.01", f"precision={precision}"]
    if chosen[0] not in ("optimizer=adamw", "optimizer=muon"):
        # Roots at steps 2, 4 and 6: the stop after 3 is between two, so roots must survive too.
        words.append("optimizer.precondition_frequency=2")
    check_exact_resume(words, tmp_path)


def test_averaged_iterates_survive_too(tiny, tmp_path):
    averaging = "{_target_: dash_shampoo.GeneralizedPrimalAveragingConfig}"
    words = [
        *tiny,
        "optimizer=dash",
        "optimizer.lr=0.01",
        "optimizer.precondition_frequency=2",
        "optimizer.betas=[0.0, 0.95]",
        f"+optimizer.iterate_averaging_config={averaging}",
    ]
    check_exact_resume(words, tmp_path)


def check_exact_resume(words, folder):
    """Six steps at once, and three and three, give the same bits everywhere."""
    words = [*words, "steps=6"]
    straight, halves = folder / "straight", folder / "halves"
    assert train(words, straight) == 0
    assert train([*words, "checkpoint_every=3", "keep_checkpoints=9"], halves) == 0
    forget_after(halves, step=3)
    assert train([*words, "resume=always"], halves) == 0

    one, other = state_of(straight), state_of(halves)
    assert one["step"] == other["step"] == 6
    pairs = dict(tensors(one)), dict(tensors(other))
    assert pairs[0].keys() == pairs[1].keys()
    assert len(pairs[0]) > 30
    different = [key for key, value in pairs[0].items() if not torch.equal(value, pairs[1][key])]
    assert different == []
    assert losses(straight) == losses(halves)
    records = read_metrics(halves / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "resume"] == [3]


def forget_after(folder, step):
    """As if the run had been killed: later checkpoints are gone, the metrics file is longer."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.rpartition("_")[2]) > step:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    assert newest(folder).name == f"step_{step:08d}"


def test_ctrl_c_leaves_a_checkpoint_that_continues(tiny, tmp_path):
    words = [*tiny, "optimizer=dash", "steps=100000", "evaluate_every=0"]
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "train", *words, f"output_dir={folder}"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not has_trained(folder) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    stopped_at = state_of(folder)["step"]
    assert f"Stopped after step {stopped_at}" in error
    assert f"output_dir={folder}" in error
    before = losses(folder)
    assert before[-1][1] == stopped_at

    config = state_of(folder)["config"]
    assert config["steps"] == 100000
    assert train([*words, f"steps={stopped_at + 2}"], folder) == 0
    after = losses(folder)
    assert after[: len(before)] == before
    assert [x[1] for x in after if x[0] == "train"] == list(range(1, stopped_at + 3))


def has_trained(folder):
    path = folder / "metrics.jsonl"
    return path.is_file() and any(r["event"] == "train" for r in read_metrics(path))


def test_a_finished_run_is_not_trained_further(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=3"]
    assert train(words, tmp_path) == 0
    before = losses(tmp_path)
    assert train(words, tmp_path) == 0
    assert losses(tmp_path) == before
    assert train([*words, "resume=never"], tmp_path) == 0
    assert losses(tmp_path) == before
    assert not any(r["event"] == "resume" for r in read_metrics(tmp_path / "metrics.jsonl"))


def test_resume_refuses_another_run(tiny, tmp_path, capsys):
    words = [*tiny, "optimizer=adamw", "steps=2"]
    assert train([*words, "resume=always"], tmp_path) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert train(words, tmp_path) == 0
    for change in ("model.width=32", "seed=1", "batch_size=8", "optimizer=dash"):
        assert train([*words, change], tmp_path) == 2
        error = capsys.readouterr().err
        assert change.split("=")[0].split(".")[0] + "=" in error
        assert "resume=never" in error


def test_a_run_may_go_on_with_another_solver(tiny, tmp_path):
    words = [*tiny, "optimizer.precondition_frequency=2"]
    assert train([*words, "optimizer=distributed_shampoo", "steps=3"], tmp_path) == 0
    assert train([*words, "optimizer=dash", "solver=newton_db", "steps=6"], tmp_path) == 0
    assert [x[1] for x in losses(tmp_path) if x[0] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_diverged_run_stops(tiny, tmp_path, capsys):
    words = [*tiny, "optimizer=adamw", "optimizer.lr=1e30", "steps=9", "clip_grad_norm=null"]
    assert train(words, tmp_path) == 1
    assert "smaller optimizer.lr" in capsys.readouterr().err
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text.splitlines()[-1])["loss"] is None


def test_bad_data_is_told_before_the_first_step(tiny, tmp_path, capsys):
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes([200, 0]) * 400)
    own = [word for word in tiny if not word.startswith("data.")]
    words = [*own, "data=token_files", f"data.train={path}", f"data.validation={path}", "steps=1"]
    for more, message in [
        (["data.vocab_size=100"], "tokens.bin holds token 200, outside of its vocabulary of 100"),
        (["data.vocab_size=200"], "tokens.bin holds token 200, outside of its vocabulary of 200"),
        ([], "data.vocab_size must be given"),
        (["data.vocab_size=201", "sequence_length=400"], "has 400 tokens, too few for one window"),
        (["data.vocab_size=201", "data.train=nowhere.bin"], "data.train: no file matches"),
    ]:
        assert train([*words, *more], tmp_path / "bad") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad" / "metrics.jsonl").exists()
    assert train([*words, "data.vocab_size=201", "optimizer=adamw"], tmp_path / "good") == 0


def test_old_checkpoints_are_removed(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=5", "checkpoint_every=1", "keep_checkpoints=2"]
    assert train(words, tmp_path) == 0
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005"]


def test_a_full_disk_ends_the_run_with_a_sentence(tiny, tmp_path, monkeypatch, capsys):
    words = [*tiny, "optimizer=adamw", "steps=2", "checkpoint_every=1"]

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        assert train(words, tmp_path) == 1
    error = capsys.readouterr().err
    assert "The checkpoint of step 1 can't be written to" in error
    assert "No space left on device" in error
    assert newest(tmp_path) is None
    assert train(words, tmp_path) == 0
    assert state_of(tmp_path)["step"] == 2
    assert not list((tmp_path / "checkpoints").glob("tmp_*"))


def test_a_disk_that_is_too_small_is_told_at_the_start(tiny, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("experiments.startup.shutil.disk_usage", lambda path: usage)
        assert train([*tiny, "steps=1"], tmp_path) == 2
    assert "has 0.00 GiB left, and a checkpoint takes about" in capsys.readouterr().err
    assert train([*tiny, "steps=1"], "/dev/null/nowhere") == 2
    assert (
        "output_dir=/dev/null/nowhere can't be written to: Not a directory"
        in capsys.readouterr().err
    )
    assert train([*tiny, "steps=1"], "/proc/nowhere") == 2
    assert "output_dir=/proc/nowhere can't be written to" in capsys.readouterr().err


def damage(path, how):
    match how:
        case "cut off":
            (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-500])
        case "emptied":
            (path / "state.pt").write_bytes(b"")
        case "overwritten":
            (path / "state.pt").write_bytes(b"not a checkpoint at all" * 99)


@pytest.mark.parametrize("how", ["cut off", "emptied", "overwritten"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, tiny, tmp_path, capsys, caplog):
    words = [*tiny, "optimizer=adamw", "steps=6", "checkpoint_every=2", "keep_checkpoints=9"]
    assert train(words, tmp_path) == 0
    before = losses(tmp_path)
    damage(newest(tmp_path), how)
    half_written = tmp_path / "checkpoints" / "tmp_step_00000008"
    half_written.mkdir()
    assert train(words, tmp_path) == 0
    assert "A damaged checkpoint is now" in caplog.text
    assert losses(tmp_path) == before
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "resume"] == [4]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    steps = [f"step_{step:08d}" for step in (2, 4, 6)]
    assert names == ["damaged_step_00000006", *steps]


def test_a_checkpoint_that_was_being_replaced_is_found_again(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=2"]
    assert train(words, tmp_path) == 0
    path = newest(tmp_path)
    path.rename(path.with_name(f"old_{path.name}"))
    assert train([*words, "resume=always"], tmp_path) == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]


def test_what_is_configured_wins_over_the_checkpoint(tiny, tmp_path, capsys):
    words = [*tiny, "optimizer.lr=0.01", "steps=4", "stop_after=2"]
    assert train(words, tmp_path) == 0
    assert state_of(tmp_path)["step"] == 2
    capsys.readouterr()
    changed = ["optimizer.lr=0.02", "optimizer.betas=[0.8,0.95]", "optimizer.weight_decay=0.1"]
    assert train([*words, *changed, "steps=6", "stop_after=null"], tmp_path) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr: 0.01 -> 0.02" in printed
    assert "steps: 4 -> 6" in printed
    (group,) = state_of(tmp_path)["optimizer"]["param_groups"]
    assert list(group["betas"]) == [0.8, 0.95]
    assert group["weight_decay"] == 0.1
    records = read_metrics(tmp_path / "metrics.jsonl")
    (resume,) = [r for r in records if r["event"] == "resume"]
    assert resume["changed"] == {
        "steps": [4, 6],
        "optimizer.lr": [0.01, 0.02],
        "optimizer.betas": [[0.9, 0.95], [0.8, 0.95]],
        "optimizer.weight_decay": [0.0, 0.1],
    }
    rates = [r["lr"] for r in records if r["event"] == "train"]
    assert max(rates[2:]) > 0.012 > max(rates[:2])


def test_two_runs_of_one_second_have_two_folders(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.train.time.strftime", lambda form: "20260101-000000")
    for _ in range(3):
        assert main(["train", *tiny, "optimizer=adamw", "steps=1"]) == 0
    stem = "tiny_adamw_20260101-000000"
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert names == [stem, f"{stem}_2", f"{stem}_3"]
    assert all(len(losses(tmp_path / "outputs" / name)) == 3 for name in names)


def test_the_order_of_the_data_has_a_seed_of_its_own(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=1"]
    for name, more in [("one", []), ("same", ["data_seed=42"]), ("other", ["data_seed=1"])]:
        assert train([*words, *more], tmp_path / name) == 0
    one, same, other = (losses(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one[0] == other[0]  # the same weights
    assert one[1] != other[1]


def test_a_run_may_stop_early_and_keep_checkpoints_for_good(tiny, tmp_path):
    words = [*tiny, "optimizer=adamw", "steps=9", "keep_checkpoints=1"]
    assert (
        train([*words, "stop_after=7", "keep_every=2", "checkpoint_every=1"], tmp_path / "a") == 0
    )
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in (2, 4, 6, 7)]
    # The schedule is that of all nine steps, so that going on gives what the straight run does.
    assert train(words, tmp_path / "straight") == 0
    assert losses(tmp_path / "a")[-1][:2] == ("validation", 7)
    assert train([*words, f"resume_from={tmp_path / 'a'}"], tmp_path / "b") == 0
    ends = {x for x in losses(tmp_path / "straight") if x[1] > 7}
    assert ends == {x for x in losses(tmp_path / "b") if x[1] > 7}
    # From one checkpoint of several, without touching that folder.
    source = tmp_path / "a" / "checkpoints" / names[1]
    assert train([*words, f"resume_from={source}"], tmp_path / "c") == 0
    assert losses(tmp_path / "c")[-1] == losses(tmp_path / "straight")[-1]
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == names


def test_a_missing_source_is_named(tiny, tmp_path, capsys):
    assert train([*tiny, "steps=1", "resume_from=nowhere"], tmp_path) == 2
    assert "resume_from=nowhere: there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averaged_weights_are_evaluated_and_survive(averaging, tiny, tmp_path):
    words = [
        *tiny,
        "optimizer=adamw",
        "optimizer.lr=0.01",
        f"averaging={averaging}",
        "ema_decay=0.5",
    ]
    assert train([*words, "steps=6"], tmp_path / "whole") == 0
    assert train([*words, "steps=6", "stop_after=3"], tmp_path / "halves") == 0
    assert train([*words, "steps=6"], tmp_path / "halves") == 0
    whole, halves = (state_of(tmp_path / name)["averaged"] for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    last = [r for r in records if r["event"] == "validation"][-1]
    assert last["averaged_loss"] != last["loss"]
    assert last["averaged_loss"] == pytest.approx(last["loss"], abs=0.5)
    weights = state_of(tmp_path / "whole")["model"]
    assert not torch.equal(whole["module.head.weight"], weights["head.weight"])


def test_metrics_survive_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write("start")
    for step in (1, 2, 3):
        metrics.write("train", step=step, loss=float("inf"))
    metrics.close()
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    resumed = MetricsFile(path, resume_step=2)
    resumed.write("resume", step=2)
    resumed.close()
    assert [(r["event"], r.get("step")) for r in read_metrics(path)] == [
        ("start", None), ("train", 1), ("train", 2), ("resume", 2),
    ]  # fmt: skip
    again = MetricsFile(path, resume_step=2)
    again.close()
    assert len(read_metrics(path)) == 3


def test_configs_of_the_optimizer_are_not_in_the_file():
    model = torch.nn.Linear(4, 3)
    optimizer = dash_shampoo.DashShampoo(
        model.parameters(), grafting_config=dash_shampoo.AdamPreconditionerConfig()
    )
    state = optimizer.state_dict()
    stripped = checkpoint.without_configs(state)
    assert "grafting_config" in state["param_groups"][0]
    assert "grafting_config" not in stripped["param_groups"][0]
    assert stripped["param_groups"][0]["lr"] == state["param_groups"][0]["lr"]
    configured = checkpoint.plain_groups(optimizer)
    whole = checkpoint._merged(stripped, state, configured, configured)["param_groups"]
    assert whole == state["param_groups"]
    stripped["param_groups"][0] |= {"lr": 0.5, "counter": 7}
    other = [configured[0] | {"lr": 0.3}]
    (group,) = checkpoint._merged(stripped, state, configured, other)["param_groups"]
    assert (group["lr"], group["counter"]) == (0.3, 7)
    (group,) = checkpoint._merged(stripped, state, configured, configured)["param_groups"]
    assert group["lr"] == 0.5
    with pytest.raises(ValueError, match="0 parameter groups, the optimizer 1"):
        checkpoint._merged({**stripped, "param_groups": []}, state, [], configured)
