"""Runs of the DASH repository: every option is known, what we compose says the same, and it trains."""

import shlex

import numpy as np
import pytest

from experiments import dash_options as options
from experiments.builders import build
from experiments.from_dash import translate
from experiments.main import main
from experiments.settings import SettingsError
from tests.docs.markdown import ROOT
from tests.experiments.composing import composed

# As their run script makes them: one cell of the paper's grid.
CELL = (
    "torchrun --standalone --nproc_per_node=8 ./main.py --latest_ckpt_interval=1000 --compile True "
    "--model=llama --vocab_size=32000 --batch_size=32 --acc_steps=64 --datasets_dir=data "
    "--n_layer=16 --n_embd=2048 --n_head=16 --warmup_steps=910 --iterations=9089 --opt=dash-gpu "
    "--wandb --wandb_run_prefix=953M --wandb_group=g --wandb_job_type=j --wandb_project=DASH "
    "--distributed_backend=nccl --results_base_folder=results/a --eval_interval=100 --dataset=c4 "
    "--log_interval=1 --shmp_log_stats_interval=500 --sequence_length=1024 --data_seed=666 --lr=1e-3 "
    "--weight_decay=0 --shmp_max_prec_dim=1024 --shmp_algo_one_dim=shmp --shmp_eps_inv_root=0 "
    "--shmp_inv_root_freq=1 --shmp_matrix_scaling_type=pim --shmp_matmul_dtype=fp32 --shmp_mu=0 "
    "--shmp_newton_steps=10 --shmp_inv_root_method=ndb --shmp_beta_g=0.9 --shmp_beta_lr=0.95 "
    "--shmp_beta_graft=0.95 --shmp_clenshaw_version=51"
)
# What the options of a small run have in common.
SMALL = (
    "python main.py --datasets_dir data --dataset c4 --vocab_size 50 --n_layer 1 --n_embd 16 "
    "--n_head 2 --batch_size 4 --acc_steps 2 --sequence_length 8 --iterations 4 --warmup_steps 1 "
    "--eval_interval 2 --eval_batches 2 --device cpu --dtype float32 --shmp_max_prec_dim 16 --seed 3 "
    "--wandb_group g --wandb_job_type j --results_base_folder out "
)
RUNS = {
    "gpu": "--opt dash-gpu --shmp_mu 0 --shmp_inv_root_freq 2",
    "layers": "--opt dash-lw --shmp_mu 0 --shmp_inv_root_method cn --shmp_matrix_scaling_type pi",
    "shampoo": "--opt dist-shmp --shmp_mu 0 --shmp_inv_root_method cn --shmp_eps_inv_root 0",
    "fork": "--opt dist-shmp --shmp_mu 0.5 --shmp_use_nesterov 1 --shmp_inv_root_method ndb",
    "chebyshev": "--opt dash-gpu --shmp_mu 0 --shmp_inv_root_method cbshv --shmp_algo_one_dim shmp",
    "adamw": "--opt adamw --scheduler wsd --exponential_moving_average --limit_iters_to 3",
    "gpt2": "--opt dash-gpu --model base --shmp_mu 0 --scheduler linear --permanent_ckpt_interval 2",
    "heuristic": "--opt dash-gpu --shmp_mu 0 --shmp_evd_heuristic relu --scheduler cos_inf",
    "none": "--opt dash-gpu --shmp_mu 0 --scheduler none --grad_clip 0",
}


def settings_of(command):
    words = shlex.split(command)
    return words[words.index("train") + 1 :]


def test_a_cell_of_the_paper():
    command, notes = translate(CELL)
    assert command.startswith(
        "WANDB_ENTITY=ist WANDB_PROJECT=DASH WANDB_RUN_GROUP=g WANDB_JOB_TYPE=j "
        "torchrun --standalone --nproc_per_node=8 -m experiments train "
    )
    config = composed(settings_of(command))
    assert (config.batch_size, config.micro_batch_size) == (2048, 32)
    assert (config.steps, config.seed, config.data_seed, config.precision.name) == (
        9089,
        0,
        666,
        "bf16",
    )
    assert config.data.train == "data/c4/train.bin"
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.epsilon) == (1e-3, [0.9, 0.95], 1e-30)
    solver = optimizer.preconditioner_config.amortized_computation_config
    assert (solver.num_iterations, solver.matmul_precision) == (10, "tf32")
    assert (solver.scaling.num_vectors, solver.scaling.safety_factor) == (16, 2.0)
    assert config.parallelism.strategy == "ddp"
    assert config.diagnose_every == 500
    text = "\n".join(notes)
    assert "allow_tf32" in text
    assert "--shmp_clenshaw_version is not needed" in text
    assert "--wandb_run_prefix is not needed" in text


@pytest.mark.parametrize("name", RUNS)
def test_the_printed_command_trains(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "c4"
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)
    tokens.tofile(folder / "train.bin")
    tokens[:400].tofile(folder / "val.bin")
    assert main(["from-dash", SMALL + RUNS[name]]) == 0
    (command,) = capsys.readouterr().out.splitlines()
    assert command.startswith("python -m experiments train ")
    assert main(["train", *settings_of(command)]) == 0
    assert (tmp_path / "out" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("method", ["evd", "cn", "ndb", "cbshv"])
def test_solvers_are_built_with_their_settings(method):
    line = (
        f"--opt dash-gpu --shmp_inv_root_method {method} --shmp_matmul_dtype fp16 "
        "--shmp_newton_steps 7 --shmp_cbshv_degree 30 --shmp_cn_tolerance 1e-3 "
        "--shmp_evd_heuristic abs-add"
    )
    config = composed(settings_of(translate(SMALL + line)[0]))
    solver = build(config.optimizer.preconditioner_config.amortized_computation_config, "solver")
    seen = vars(solver) if hasattr(solver, "__dict__") else {}
    expected = {
        "evd": {},
        "cn": {"max_iterations": 7, "tolerance": 1e-3, "matmul_precision": "fp16"},
        "ndb": {"num_iterations": 7, "matmul_precision": "fp16"},
        "cbshv": {"degree": 30, "matmul_precision": "fp16"},
    }[method]
    assert expected.items() <= seen.items()
    if method == "evd":
        assert solver.rank_deficient_stability_config.method == "abs_add"


def outcome(line):
    """The translation, or why there is none."""
    try:
        return translate(line)
    except SettingsError as error:
        return str(error)


@pytest.mark.parametrize("name", sorted({*options.MAPPED, *options.REFUSED} - {"opt"}))
def test_no_option_is_passed_over(name):
    """Another value changes the command, is refused, or is told of."""
    default = options.MAPPED.get(name)
    other = {"scheduler": "wsd", "dataset": "wikitext", "model": "base", "device": "cuda"}
    other |= {"dtype": "float16", "decay_type": "exp", "shmp_inv_root_method": "jorge"}
    other |= {"shmp_grafting_type": "adagrad", "shmp_evd_heuristic": "abs", "cos_inf_steps": "5"}
    other |= {"shmp_matmul_dtype": "bf16", "shmp_matrix_scaling_type": "pi"}
    other |= {"shmp_algo_one_dim": "shmp", "shmp_ndb_root4_src": "sqrt_inv"}
    value = other.get(name, "x" if isinstance(default, str) or default is None else "")
    if not value and not isinstance(default, bool):
        value = str(type(default)(default * 2 + 3)) if name != "ema_decay" else "0.5"
    value = {"wsd_fract_decay": "0.25", "shmp_mu": "0.25", "shmp_start_prec_step": "20"}.get(
        name, value
    )
    # What gives the option a part at all.
    context = "--opt dash-gpu --dataset c4 --wandb --shmp_inv_root_method ndb"
    if name == "shmp_evd_heuristic":
        context += " --shmp_inv_root_method evd"
    if name in ("shmp_cn_tolerance", "shmp_cbshv_degree"):
        context += f" --shmp_inv_root_method {'cn' if 'cn' in name else 'cbshv'}"
    if name.startswith("wsd") or name == "decay_type":
        context += " --scheduler wsd"
    if name == "cos_inf_steps":
        context += " --scheduler cos_inf"
    if name.startswith("ema"):
        context += " --exponential_moving_average"
    if "_pi_steps" in name or "scaling_const" in name:
        context += " --shmp_matrix_scaling_type pim"
    if name.startswith(("shmp_beta1", "shmp_beta2", "shmp_beta_prec", "shmp_beta_gg", "shmp_ndb")):
        context += " --opt dist-shmp"
    if name == "wandb":
        context = context.replace(" --wandb", "")
    before = translate(f"python main.py {context}")
    given = f"--{name}" if name in options.FLAGS else f"--{name} {value}"
    after = outcome(f"python main.py {context} {given}")
    if isinstance(after, str):
        assert name in after or str(value) in after
    assert after != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--shmp_newton_step 3", "no option of the DASH repository's main.py; did they have"),
        ("--lr", "--lr needs a value"),
        ("--lr fast", "--lr fast must be a number"),
        ("--opt dion", "--opt dion has no counterpart"),
        ("--opt dash-gpu --resume_from x", "their checkpoints hold no state"),
        ("--opt dash-gpu --dataset fineweb", "--dataset fineweb has no counterpart"),
    ],
)
def test_what_has_no_counterpart_is_refused(line, message):
    with pytest.raises(SettingsError, match=message):
        translate(f"python main.py {line}")


def test_the_page_names_every_option():
    text = (ROOT / "docs" / "coming-from-dash.md").read_text()
    names = {*options.MAPPED, *options.REFUSED, *options.NOT_NEEDED}
    assert len(names) > 90
    missing = [n for n in names if f"`--{n}" + ("…`" if n.endswith("_") else "`") not in text]
    assert missing == []
