"""The convnet on images, and runs of Meta's example as runs of ours."""

import importlib.util
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import dash_shampoo as ds
from experiments import from_meta
from experiments.builders import build
from experiments.images import cifar10, digits
from experiments.main import main
from experiments.metrics import read_metrics
from experiments.settings import SettingsError
from tests.experiments.composing import composed
from tests.processes import run_experiments

THEIRS = "python -m distributed_shampoo.examples.cifar10_example"


def epochs(folder: Path) -> list[dict]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["event"] == "epoch"]


@pytest.mark.parametrize("optimizer", ["dash_default", "distributed_shampoo", "adamw", "sgd"])
def test_it_learns(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"optimizer={optimizer}", "epochs=2", "channels=8", "device=cpu"]
    assert main(["classify", *words, f"output_dir={tmp_path}"]) == 0
    first, second = epochs(tmp_path)
    assert (first["step"], second["step"]) == (11, 22)
    assert second["validation_loss"] < first["validation_loss"] < 2.3
    assert second["accuracy"] > 0.5
    assert "digits, " in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fully_shard"])
def test_two_processes_do_what_one_does(strategy: str, tmp_path: Path) -> None:
    words = ["optimizer=adamw", "channels=8", "device=cpu", "num_threads=1", "batch_size=100"]
    assert main(["classify", *words, f"output_dir={tmp_path / 'one'}"]) == 0
    own = [*words, f"parallelism={strategy}", f"output_dir={tmp_path / 'two'}"]
    ended = run_experiments(2, ["classify", *own], tmp_path)
    assert [one.status for one in ended] == [0, 0], ended
    (one,), (two,) = epochs(tmp_path / "one"), epochs(tmp_path / "two")
    assert one["step"] == two["step"] == 13
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    # Every process has the mean of its own images; together they are those of one process.
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_images_are_of_the_size_that_a_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset(root: str, train: bool, download: bool) -> types.SimpleNamespace:
        if root == "nowhere":
            raise RuntimeError("Dataset not found or corrupted.")
        count = 6 if train else 4
        data = np.full((count, 32, 32, 3), 255, dtype=np.uint8)
        data[:, :, :, 1] = 0
        return types.SimpleNamespace(data=data, targets=list(range(count)))

    module = types.ModuleType("torchvision.datasets")
    module.CIFAR10 = dataset  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, module)
    module.__spec__ = importlib.util.spec_from_loader("torchvision", None)
    images = cifar10("data")
    assert images.inputs.shape == (6, 3, 32, 32)
    assert images.validation_inputs.shape == (4, 3, 32, 32)
    assert images.inputs[0, :, 5, 7].tolist() == [1.0, -1.0, 1.0]
    assert images.num_classes == 6
    with pytest.raises(SettingsError, match=r"images.folder=nowhere: Dataset not found"):
        cifar10("nowhere")
    assert digits().inputs.shape == (1300, 1, 8, 8)


# ------------------------------------------------------------------------------ from-meta


def train_words(line: str, **options: str) -> list[str]:
    command, _ = from_meta.translate(line, **options)
    words = shlex.split(command)
    return words[words.index("classify") + 1 :]


def optimizer_of(line: str, params: list) -> torch.optim.Optimizer:
    config = composed(train_words(line, images="digits"), "classify")
    return build(config.optimizer, "optimizer")(params)


def test_shampoo_is_set_as_in_their_file() -> None:
    group = optimizer_of(THEIRS, [torch.nn.Parameter(torch.ones(3, 2))]).param_groups[0]
    assert group["lr"] == 0.001
    assert group["betas"] == (0.9, 1.0)
    assert group["epsilon"] == 1e-12
    assert group["weight_decay"] == 0.0
    assert group["max_preconditioner_dim"] == 1024
    assert group["precondition_frequency"] == group["start_preconditioning_step"] == 100
    assert group["grafting_config"] == ds.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8)
    solver = group["preconditioner_config"].amortized_computation_config
    assert type(solver) is ds.EigenConfig


def test_their_settings_of_the_optimizer_are_ours() -> None:
    prefix = "optimizer.preconditioner_config"
    solver = f"{prefix}.amortized_computation_config"
    types_of_theirs = "distributed_shampoo.preconditioner.matrix_functions_types"
    line = (
        f"{THEIRS} optimizer.lr=0.02 optimizer.betas=[0.8,0.9] optimizer.precondition_frequency=5 "
        f"{prefix}._target_=distributed_shampoo.RootInvKLShampooPreconditionerConfig "
        f"{solver}._target_={types_of_theirs}.CoupledNewtonConfig {solver}.max_iterations=20"
    )
    group = optimizer_of(line, [torch.nn.Parameter(torch.ones(3, 2))]).param_groups[0]
    assert (group["lr"], group["betas"], group["precondition_frequency"]) == (0.02, (0.8, 0.9), 5)
    config = group["preconditioner_config"]
    assert type(config) is ds.RootInvKLShampooPreconditionerConfig
    assert config.amortized_computation_config == ds.CoupledNewtonConfig(max_iterations=20)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("batch_size=64 epochs=3 seed=7", ["batch_size=64", "epochs=3", "seed=7"]),
        ("disable_linear_bias=true out_channels=16", ["bias=false", "channels=16"]),
        ("data_path=/data metrics_dir=/m", ["images.folder='/data'", "output_dir='/m'"]),
        ("optimizer=sgd", ["optimizer=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9"]),
        ("optimizer=adamw optimizer.lr=1", ["optimizer=adamw", "optimizer.lr=1"]),
    ],
)
def test_a_run_of_one_process(words: str, expected: list[str]) -> None:
    ours = train_words(f"{THEIRS} {words}")
    assert set(expected) <= set(ours)
    composed(ours, "classify")


@pytest.mark.parametrize(
    ("strategy", "ours"),
    [("ddp", "ddp"), ("fsdp", "fully_shard"), ("fully_shard", "fully_shard")],
)
def test_a_run_of_several_processes(strategy: str, ours: str) -> None:
    line = f"torchrun --nproc_per_node=4 -m {THEIRS.split()[-1]} parallelism={strategy}"
    command, notes = from_meta.translate(f"{line} local_batch_size=32 backend=gloo")
    assert command.startswith("torchrun --nproc_per_node=4 -m experiments classify ")
    assert {f"parallelism={ours}", "batch_size=128"} <= set(command.split())
    assert any("backend" in note for note in notes)
    assert any("FSDP 1" in note for note in notes) == (strategy != ours)


def test_replicas_of_shards() -> None:
    line = f"torchrun --nproc-per-node 8 -m {THEIRS.split()[-1]} parallelism=hsdp"
    words = train_words(f"{line} dp_replicate_degree=4 local_batch_size=16")
    assert {"parallelism=hybrid_shard", "parallelism.replicate_degree=4"} <= set(words)
    assert "batch_size=128" in words
    composed(words, "classify")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python train.py", "does not call cifar10_example"),
        (f"{THEIRS} epoch=3", "did they have epochs"),
        (f"{THEIRS} --verbose", "of the form key=value"),
        (f"{THEIRS} optimizer=lion", "must be one of sgd, adam, adamw, shampoo"),
        (f"{THEIRS} 'oops", "can't be read"),
    ],
)
def test_what_is_not_theirs_is_refused(line: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_meta.translate(line)


def test_it_prints_a_command_that_trains(capsys: pytest.CaptureFixture) -> None:
    line = f"{THEIRS} optimizer.precondition_frequency=5 out_channels=8 verbose=true"
    assert main(["from-meta", line, "--images", "digits"]) == 0
    captured = capsys.readouterr()
    assert "# verbose has no part in ours" in captured.err
    words = shlex.split(captured.out)
    assert words[:4] == ["python", "-m", "experiments", "classify"]
    assert main([*words[3:], "device=cpu"]) == 0
    assert "epoch 1: " in capsys.readouterr().out


def test_every_setting_of_their_files_is_known() -> None:
    found = importlib.util.find_spec("distributed_shampoo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs Meta's package")
    configs = Path(found.submodule_search_locations[0]) / "examples" / "configs"
    names = yaml.safe_load((configs / "cifar10.yaml").read_text()).keys() - {"defaults"}
    assert names <= from_meta.SETTINGS.keys() | from_meta.NOT_NEEDED.keys()
    for path in (configs / "optimizer").glob("*.yaml"):
        line = f"{THEIRS} optimizer={path.stem}"
        group = optimizer_of(line, [torch.nn.Parameter(torch.ones(3, 2))]).param_groups[0]
        for key, value in yaml.safe_load(path.read_text()).items():
            if key.startswith("_"):
                continue
            if key == "start_preconditioning_step":
                assert (value, group[key]) == (-1, group["precondition_frequency"])
            elif key == "beta3":
                assert (value, group[key]) == (-1.0, group["betas"][0])
            elif key == "betas":
                assert list(group[key]) == value
            elif isinstance(value, float | int) or key in ("eps", "epsilon"):
                assert group[key] == float(value), (path.stem, key)
    for path in (configs / "parallelism").glob("*.yaml"):
        composed(train_words(f"{THEIRS} parallelism={path.stem}", images="digits"), "classify")
