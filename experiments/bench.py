"""``python -m experiments bench``: time of an optimizer's step on a model's shapes, on one rank or on many.

All optimizers of a comparison take their steps in one interleaved run, in one precision, on given
gradients: no model is run. ``base`` is Distributed Shampoo as it comes, ``layer_wise`` has a stack for
each parameter, ``whole`` one for all parameters of the rank.
"""

import argparse
import json
import logging
import os
import statistics
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

import dash_shampoo as ds
from benchmarks.cases import Case, make_gradients, make_parameters, set_gradients
from benchmarks.ours import CONFIGS, Config, shampoo
from benchmarks.peers import PEERS
from benchmarks.phases import phase_milliseconds
from benchmarks.rank_share import blocks_of_rank
from benchmarks.step_time import Variant, run_case
from experiments.bench_report import write
from experiments.builders import build_model
from experiments.command_line import Parser, positive
from experiments.environment import environment
from experiments.paper_table import LISTS, Setting, in_precision, paper_settings
from experiments.parallel import Process, process_group
from experiments.settings import CONFIGS as FOLDER
from experiments.settings import SettingsError, register

_EPILOG = """\
examples:
  python -m experiments bench
  python -m experiments bench --model llama_953m --share 8 --solvers newton_db default --device cuda
  python -m experiments bench --paper --device cuda
  torchrun --nproc-per-node 8 -m experiments bench --paper --device cuda
"""

_PLAIN = Config(ds.RootInvShampooPreconditionerConfig)


@dataclass
class Measured:
    """One optimizer at one setting.

    Attributes:
        name: ``base``, ``layer_wise``, ``whole``, or that of a peer.
        setting: Solver and precision.
        block: Largest block.
        frequency: Steps from one refresh to the next.
        milliseconds: Of a step, per round; of several ranks the slowest.
        phases: Milliseconds by phase, of a run apart; empty for peers.
    """

    name: str
    setting: str
    block: int
    frequency: int
    milliseconds: list[float]
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.milliseconds)


def main(words: Sequence[str]) -> int:
    """Carry out ``bench``.

    Args:
        words: The command line after ``bench``.

    Returns:
        Exit status, as of `experiments.main.main`.

    Raises:
        SettingsError: If a setting can't be used.
    """
    options = _parse(words)
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    is_distributed = "RANK" in os.environ
    strategy = OmegaConf.create({"strategy": "ddp" if is_distributed else "none"})
    with process_group(strategy, options.device) as process:
        options.device = process.device.type
        options.clock = _clock(process.device, options.threads)
        found = [
            one
            for block in options.blocks
            for setting in _settings(options, process)
            for one in _measure(setting, block, options, process)
        ]
        if process.is_first:
            machine = environment(process.device, process.world_size)
            settings = {k: v for k, v in vars(options).items() if k != "out"}
            record = {**machine, "settings": settings, "results": [asdict(x) for x in found]}
            text = write(found, options, machine, options.out)
            (options.out / "bench.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            print(text)
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments bench",
        description=(__doc__ or "").partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    models = sorted(path.stem for path in (FOLDER / "model").glob("*.yaml"))
    add = parser.add_argument
    add("--model", choices=models, help="whose shapes (tiny; with --paper llama_953m)")
    add("--vocab", type=positive, default=32_000, help="tokens in its vocabulary")
    add("--share", type=positive, help="one rank does the part of one of so many (1; --paper: 8)")
    add(
        "--lists", nargs="+", choices=LISTS, default=list(LISTS), help="how blocks are put together"
    )
    default = ["eigen", "newton_db", "default"]
    add("--solvers", nargs="+", choices=list(CONFIGS), default=default, help="solvers and lists")
    add("--blocks", nargs="+", type=positive, help="largest blocks (64; with --paper 1024 2048)")
    add("--precisions", nargs="+", default=["fp32"], help="of products inside of inverse roots")
    add("--frequencies", nargs="+", type=positive, default=[1, 10], help="steps between refreshes")
    add("--peers", nargs="*", choices=[*PEERS, "all"], default=[], help="where they are installed")
    add("--paper", action="store_true", help="the settings of the paper's table, and its figures")
    add("--rounds", type=positive, default=5, help="timed rounds")
    add("--warmup", type=int, default=1, help="rounds before them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=positive, default=1, help="threads of the CPU")
    add(
        "--out", type=Path, default=Path("bench"), help="folder of README.md, bench.json, bench.png"
    )
    options = parser.parse_args(words)
    options.model = options.model or ("llama_953m" if options.paper else "tiny")
    options.share = options.share or (8 if options.paper else 1)
    options.blocks = options.blocks or ([1024, 2048] if options.paper else [64])
    if options.warmup < 0:
        raise SettingsError(f"--warmup {options.warmup} must be at least 0.")
    known = ("fp32", "tf32", "fp16x3", "fp16", "bf16")
    for precision in options.precisions:
        if precision not in known:
            raise SettingsError(f"--precisions {precision}: one of {', '.join(known)}.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {options.out} can't be made: {error.strerror}.") from error
    options.peers = [*PEERS] if "all" in options.peers else options.peers
    return options


def _clock(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return "cuda"
    # The time of a rank that waits for others is not its processor's.
    return "processor" if threads == 1 and not torch.distributed.is_initialized() else "wall clock"


def _settings(options: argparse.Namespace, process: Process) -> list[Setting]:
    if options.paper:
        return paper_settings("tf32" if process.device.type == "cuda" else "fp32")
    found = {}
    for solver in options.solvers:
        for precision in options.precisions:
            config, name = in_precision(CONFIGS[solver].make(), solver, precision)
            base = config if CONFIGS[solver].on_base else None
            found[name] = Setting(name, config, base, tuple(options.frequencies), solver)
    return list(found.values())


def _measure(
    setting: Setting, block: int, options: argparse.Namespace, process: Process
) -> list[Measured]:
    """All lists and peers at one setting, interleaved."""
    shapes = _shapes(options)
    numbers = list(range(len(shapes)))
    if options.share > 1 and process.world_size == 1:
        owned = blocks_of_rank(shapes, block, options.share)
        numbers, shapes = [n for n, _ in owned], [shape for _, shape in owned]
    case = Case(options.model, [(shape, 1) for shape in shapes], block)
    variants = []
    for name in options.lists:
        config = setting.base if name == "base" else setting.ours
        if config is not None:
            kind = replace(CONFIGS.get(setting.solver, _PLAIN), make=partial(copy, config))
            split = {"split": partial(_by_layer, numbers)} if name == "layer_wise" else {}
            optimizer_class = ds.DistributedShampoo if name == "base" else ds.DashShampoo
            is_distributed = process.world_size > 1
            make = shampoo(optimizer_class, kind, block, is_distributed=is_distributed, **split)
            variants.append(Variant(name, setting.solver, "ours", make))
    for name in options.peers if process.world_size == 1 else ():
        if PEERS[name].solver in ("", setting.solver) and PEERS[name].is_importable():
            variants.append(Variant(name, setting.solver, "peer", partial(PEERS[name].make, block)))
    run = argparse.Namespace(
        **{**vars(options), "memory": False, "frequencies": setting.frequencies}
    )
    run_case(case, variants, run)
    found = []
    for variant in variants:
        for frequency, times in variant.times.items():
            slowest = [max(ranks) for ranks in zip(*process.gathered(times), strict=True)]
            phases: dict[str, float] = {}
            if variant.kind == "ours":
                phases = _phases(variant, case, frequency, process)
            found.append(Measured(variant.name, setting.name, block, frequency, slowest, phases))
    if process.is_first:
        medians = ", ".join(f"{m.name} every {m.frequency} {m.median:.1f} ms" for m in found)
        print(f"block {block}, {setting.name}: {medians}", flush=True)
    return found


def _shapes(options: argparse.Namespace) -> list[tuple[int, ...]]:
    register()
    with initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
        config = compose("plan", [f"model={options.model}"])
    with torch.device("meta"):
        model = build_model(config.model, options.vocab, config.sequence_length)
    return [tuple(p.shape) for p in model.parameters()]


def _by_layer(
    numbers: Sequence[int], parameters: Sequence[nn.Parameter]
) -> list[list[nn.Parameter]]:
    """The blocks of each of the model's parameters; all together where they are other ones."""
    if len(parameters) != len(numbers):
        return [list(parameters)]
    layers: dict[int, list[nn.Parameter]] = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        layers.setdefault(number, []).append(parameter)
    return list(layers.values())


def _phases(variant: Variant, case: Case, frequency: int, process: Process) -> dict[str, float]:
    """Where the time goes, in steps of their own that cover whole periods of the refresh."""
    values = make_parameters(case, process.device.type)
    parameters = [nn.Parameter(value) for value in values]
    set_gradients(parameters, make_gradients(values, 0))
    steppable = variant.make(parameters)
    optimizer: Any = getattr(steppable.step, "__self__", None)
    steppable.step()
    steppable.set_frequency(frequency)
    return phase_milliseconds(optimizer, max(frequency, 2), process.device)
