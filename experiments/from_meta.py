"""``python -m experiments from-meta``: a run of Distributed Shampoo's CIFAR-10 example as a run of ours.

The command goes to the standard output, what differs to the standard error.

Source: facebookresearch/optimizers, distributed_shampoo/examples at f606606; facts, not code.
"""

import difflib
import re
import shlex
from collections.abc import Sequence

from experiments.command_line import Parser
from experiments.settings import SettingsError
from experiments.translating import processes_of, show, split_command

_DESCRIPTION = (
    "Translates a run of Distributed Shampoo's CIFAR-10 example into one of ours. The command is printed "
    "on the standard output; what differs, and which settings have no part in it, on the standard error."
)
# Settings of their cifar10.yaml: name -> default.
SETTINGS = {
    "optimizer": "shampoo",
    "parallelism": "none",
    "batch_size": "128",
    "local_batch_size": "128",
    "data_path": "./data",
    "epochs": "1",
    "seed": "2022",
    "metrics_dir": "null",
    "dp_replicate_degree": "2",
    "out_channels": "64",
    "disable_linear_bias": "false",
}
NOT_NEEDED = {
    "window_size": "training losses are averaged over an epoch here",
    "checkpoint_dir": "a run of this size begins anew; `train` has checkpoints",
    "backend": "it follows from the device: nccl for CUDA, gloo for the CPU",
    "verbose": "only the first process prints",
}
# Their optimizers: ours, and the values of their YAML files that are not our defaults.
_OPTIMIZERS: dict[str, tuple[str, dict[str, str]]] = {
    "sgd": ("sgd", {"lr": "0.01", "momentum": "0.9", "weight_decay": "0.0"}),
    "adam": ("adam", {"lr": "0.001", "betas": "[0.9,0.999]", "eps": "1e-8"}),
    "adamw": (
        "adamw",
        {"lr": "0.001", "betas": "[0.9,0.999]", "eps": "1e-8", "weight_decay": "0.01"},
    ),
    "shampoo": (
        "dash",
        {
            "lr": "0.001",
            "betas": "[0.9,1.0]",
            "epsilon": "1e-12",
            "max_preconditioner_dim": "1024",
            "precondition_frequency": "100",
            "start_preconditioning_step": "-1",
            "grafting_config.beta2": "0.999",
            "grafting_config.epsilon": "1e-8",
        },
    ),
}
_PARALLELISMS = {
    "none": "none",
    "ddp": "ddp",
    "fully_shard": "fully_shard",
    "hybrid_shard": "hybrid_shard",
    "fsdp": "fully_shard",
    "hsdp": "hybrid_shard",
}
_SOLVER = "preconditioner_config.amortized_computation_config"
_MODULE = re.compile(r"\bdistributed_shampoo(\.\w+)*\.(?=[A-Z])")


def main(words: Sequence[str]) -> int:
    """Print the translation.

    Args:
        words: Their command line, as one word.

    Returns:
        Exit status.

    Raises:
        SettingsError: If a setting is unknown or has no counterpart.
    """
    parser = Parser(prog="python -m experiments from-meta", description=_DESCRIPTION)
    parser.add_argument("line", help="all of it, in quotes: 'python -m ....cifar10_example ...'")
    parser.add_argument("--images", default="cifar10", help="or digits, which need no download")
    options = parser.parse_args(words)
    show(*translate(options.line, options.images))
    return 0


def translate(line: str, images: str = "cifar10") -> tuple[str, list[str]]:
    """Their command line as ours.

    Args:
        line: As it was typed.
        images: What our run trains on.

    Returns:
        The command, and what differs.

    Raises:
        SettingsError: If a setting is unknown or has no counterpart.
    """
    launch, words = split_command(line, "cifar10_example")
    if launch and launch[-1] == "-m":
        launch = launch[:-1]
    given, inner, notes = _read(words)
    settings = [
        *_optimizer(given, inner["optimizer"], notes),
        *_run(given, inner["parallelism"], images, processes_of(launch), notes),
    ]
    return shlex.join([*launch, "-m", "experiments", "classify", *settings]), notes


def _read(words: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[str, str]], list[str]]:
    """Their settings, those of the optimizer and of the parallelism, and what is left out."""
    given = dict(SETTINGS)
    inner: dict[str, dict[str, str]] = {"optimizer": {}, "parallelism": {}}
    notes = []
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("+")
        group, dot, field = name.partition(".")
        if not equals:
            raise SettingsError(f"{word}: their settings are of the form key=value.")
        if dot and group in inner:
            inner[group][field] = value
        elif name in SETTINGS:
            given[name] = value
        elif name in NOT_NEEDED:
            notes.append(f"{name} has no part in ours: {NOT_NEEDED[name]}")
        else:
            near = difflib.get_close_matches(name, [*SETTINGS, *NOT_NEEDED], 1)
            hint = f"; did they have {near[0]}?" if near else ""
            raise SettingsError(f"{word} is no setting of their CIFAR-10 example{hint}")
    return given, inner, notes


def _choose(given: dict[str, str], name: str, table: dict[str, str]) -> str:
    if given[name] not in table:
        raise SettingsError(f"{name}={given[name]} must be one of {', '.join(table)}.")
    return table[given[name]]


def _optimizer(given: dict[str, str], fields: dict[str, str], notes: list[str]) -> list[str]:
    ours = _choose(given, "optimizer", {name: name for name in _OPTIMIZERS})
    name, defaults = _OPTIMIZERS[ours]
    words = [f"optimizer={name}"]
    if ours == "shampoo":
        words.append("solver=eigen")
        notes.append(
            "optimizer=dash is DashShampoo, which computes the same on stacks of blocks; "
            "optimizer=distributed_shampoo is their own class"
        )
    values = {**defaults, **fields}
    target = values.pop("_target_", None)
    if target is not None:
        notes.append(f"optimizer._target_={target} is left out: ours follows from optimizer={ours}")
    solver = {k.removeprefix(f"{_SOLVER}."): v for k, v in values.items() if _SOLVER in k}
    words += [
        f"{'' if k in defaults else '++'}optimizer.{k}={_MODULE.sub('dash_shampoo.', v)}"
        for k, v in values.items()
        if _SOLVER not in k
    ]
    if solver:
        solver.setdefault("_target_", "dash_shampoo.EigenConfig")
        # The node refers to the group `solver`; this takes its place.
        node = ", ".join(f"{k}: {_MODULE.sub('dash_shampoo.', v)}" for k, v in solver.items())
        words.append(f"optimizer.{_SOLVER}={{{node}}}")
    return words


def _run(
    given: dict[str, str],
    fields: dict[str, str],
    images: str,
    processes: int,
    notes: list[str],
) -> list[str]:
    theirs, strategy = given["parallelism"], _choose(given, "parallelism", _PARALLELISMS)
    words = [f"parallelism={strategy}"]
    if theirs != strategy:
        notes.append(f"parallelism={theirs}, of FSDP 1, is {strategy}, of FSDP 2, here")
    if strategy == "hybrid_shard":
        words.append(f"parallelism.replicate_degree={given['dp_replicate_degree']}")
    words += [f"++parallelism.{k}={v}" for k, v in fields.items() if k != "_target_"]
    batch = given["batch_size"]
    if strategy != "none":
        batch = str(_number(given, "local_batch_size") * processes)
    words += [
        f"batch_size={batch}",
        f"epochs={given['epochs']}",
        f"seed={given['seed']}",
        f"channels={given['out_channels']}",
        f"bias={'false' if given['disable_linear_bias'].lower() == 'true' else 'true'}",
        f"images={images}",
    ]
    if images == "cifar10":
        words += [f"images.folder='{given['data_path']}'", "images.download=true"]
    if given["metrics_dir"] not in ("null", ""):
        words.append(f"output_dir='{given['metrics_dir']}'")
    return words


def _number(given: dict[str, str], name: str) -> int:
    if not given[name].isdigit():
        raise SettingsError(f"{name}={given[name]} must be a whole number.")
    return int(given[name])
