"""The benchmark of a step runs, and knows every solver. How fast it finds them is no test."""

import json
import re
from dataclasses import replace

import pytest
import torch

import dash_shampoo as ds
from benchmarks import step_time
from benchmarks.cases import CASES, Case, llama, make_gradients, make_parameters
from benchmarks.memory import memory_of
from benchmarks.ours import CONFIGS
from benchmarks.peers import PEERS
from benchmarks.step_time import main, make_variants, measure_memory
from dash_shampoo.config import base_class_of
from dash_shampoo.inverse_root.registry import SOLVERS
from dash_shampoo.preconditioners.choice import STACKED_LISTS
from tests.state_bytes import real_bytes


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    case = Case("tiny", [((8, 8), 3), ((8, 4), 1), ((4,), 2)], 8)
    monkeypatch.setattr(step_time, "CASES", {"tiny": case})
    return case


def cells(text, name):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith(f"| {name}")
    ]


def test_the_tables(tmp_path, capsys):
    output, times = tmp_path / "results" / "step_time.md", tmp_path / "times.json"
    words = ["--cases", "tiny", "--rounds", "4", "--warmup", "1", "--peers", "Muon", "AdamW"]
    words += ["--frequencies", "1", "2", "0"]
    text = main([*words, "--output", str(output), "--json", str(times)])
    assert output.read_text() == text
    assert capsys.readouterr().out.split() == text.split()
    absolute = {row[0]: row[1:] for row in cells(text, "ours/") + cells(text, "base/")}
    for name, config in CONFIGS.items():
        assert all(float(cell) > 0 for cell in absolute[f"ours/{name}"][:3])
        assert (f"base/{name}" in absolute) == config.on_base
    ratios = [row for name in CONFIGS for row in cells(text, f"{name} ")]
    assert len(ratios) == 3 * len(CONFIGS)
    for row in ratios:
        assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", cell) for cell in row[5:])
        assert (row[2] == "–") != CONFIGS[row[0]].on_base
    measured = json.loads(times.read_text())["tiny"]
    assert set(measured) >= {"ours/eigen", "Muon", "AdamW"}
    assert {len(rounds) for v in measured.values() for rounds in v.values()} == {4}
    assert f"base {ds.base.name}" in text
    assert "threads of" in text


def test_every_solver_of_ours_has_a_row():
    ours = {cls for cls in SOLVERS if cls.__module__.startswith("dash_shampoo.inverse_root")}
    assert len(ours) >= 4
    # With its defaults this one is the base's coupled Newton, which has a row.
    ours.discard(ds.ScaledCoupledNewtonConfig)
    configs = [config.make() for config in CONFIGS.values()]
    solvers = {type(getattr(config, "amortized_computation_config", None)) for config in configs}
    assert ours <= solvers


def test_every_list_has_a_row():
    lists = {base_class_of(config.make()) for config in CONFIGS.values()}
    assert lists == set(STACKED_LISTS)


def test_a_refresh_interval_is_timed_as_a_whole(monkeypatch):
    steps = []
    step = ds.DashShampoo.step
    monkeypatch.setattr(ds.DashShampoo, "step", lambda self: (steps.append(1), step(self))[1])
    words = [
        "--cases",
        "tiny",
        "--solvers",
        "newton_db",
        "--peers",
        "--rounds",
        "2",
        "--warmup",
        "1",
    ]
    main([*words, "--no-memory", "--frequencies", "5"])
    assert len(steps) == 15


def test_a_step_without_a_refresh_refreshes_nothing(monkeypatch):
    frequencies = []
    step = ds.DashShampoo.step

    def note(self):
        frequencies.append(self.param_groups[0]["precondition_frequency"])
        step(self)

    monkeypatch.setattr(ds.DashShampoo, "step", note)
    words = [
        "--cases",
        "tiny",
        "--solvers",
        "newton_db",
        "--peers",
        "--rounds",
        "2",
        "--warmup",
        "1",
    ]
    main([*words, "--no-memory", "--frequencies", "1", "0"])
    assert frequencies[:3] == [1] * 3
    assert min(frequencies[3:]) > 10**6


@pytest.mark.parametrize("name", PEERS)
def test_peers_take_steps(name, tiny):
    peer = PEERS[name]
    if not peer.is_importable():
        pytest.skip(f"{peer.package} is not importable")
    parameters = [torch.nn.Parameter(value) for value in make_parameters(tiny, "cpu")]
    before = [parameter.detach().clone() for parameter in parameters]
    # DashGpu takes no parameter with a dimension below the block size.
    optimizer = peer.make(4, parameters)
    optimizer.set_frequency(2)
    for seed in range(3):
        for p, gradient in zip(parameters, make_gradients(parameters, seed), strict=True):
            p.grad = gradient
        optimizer.step()
    for old, new in zip(before, parameters, strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)
    assert peer.solver in {"", "soap", "muon", *CONFIGS}


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(PEERS, "AdamW", replace(PEERS["AdamW"], package="no_such_package"))
    words = ["--cases", "tiny", "--solvers", "--peers", "AdamW", "--rounds", "1", "--no-memory"]
    assert "Not importable here: AdamW" in main([*words, "--frequencies", "1"])


def test_ours_keeps_as_much_as_the_base(tiny):
    ours, base = make_variants(tiny.block, ["eigen"], [])
    kept = []
    for variant in (ours, base):
        parameters = make_parameters(tiny, "cpu")
        optimizer = variant.make([torch.nn.Parameter(value) for value in parameters])
        kept.append(real_bytes(optimizer.step.__self__))
        measure_memory(variant, parameters)
    assert kept[0] == kept[1]
    # Beside the state, ours counts bad gradients (16 bytes a block) and remembers dampings (4 a factor).
    books = sum((16 + 4 * len(shape)) * count for shape, count in tiny.shapes) * 4
    assert 0 < ours.state_bytes <= sum(kept[0].values()) + books
    assert ours.peak_bytes > 0


def test_memory_is_what_is_alive():
    kept = []

    def work():
        a = torch.ones(256)
        kept.append(a + 1)
        kept[0].add_(1).view(2, 128)
        b = torch.zeros(512)
        del a, b

    memory = memory_of(work)
    assert (memory.live, memory.peak) == (1024, 4096)
    kept.clear()
    assert memory.live == 0


def test_cases():
    assert {name: sum(count for _, count in case.shapes) for name, case in CASES.items()} == {
        "256x64": 128, "64x256": 32, "8x1024": 4, "146-of-64": 21, "458-of-128": 75,
        "10000-of-16": 10_000, "llama-30m": 57, "llama-953m": 147,
    }  # fmt: skip
    assert ((5632, 2048), 32) in llama(16, 2048, 32000)
    for name in ("146-of-64", "458-of-128"):
        parameters = [torch.nn.Parameter(value) for value in make_parameters(CASES[name], "cpu")]
        optimizer = ds.DashShampoo(parameters, max_preconditioner_dim=CASES[name].block)
        keys = [key for state in optimizer.state.values() for key in state]
        assert sum(key.startswith("block_") for key in keys) == int(name.split("-")[0])


def test_parameters_and_gradients_are_reproducible(tiny):
    values = make_parameters(tiny, "cpu")
    assert len(values) == 6
    for one, other in zip(make_gradients(values, 3), make_gradients(values, 3), strict=True):
        assert one.equal(other)
    assert not make_gradients(values, 3)[0].equal(make_gradients(values, 4)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "must be at least 1"),
        (["--frequencies", "-1"], "must be at least 0"),
        (["--cases", "unknown"], "invalid choice"),
    ],
)
def test_bad_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err
