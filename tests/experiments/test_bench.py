"""Step times: tables, JSON and a picture."""

import json
import math

import pytest
import torch

import dash_shampoo
from benchmarks.cases import llama
from benchmarks.peers import of_groups
from benchmarks.phases import PHASES, phase_milliseconds
from benchmarks.rank_share import blocks_of_rank
from experiments.main import main
from tests.processes import run_experiments

QUICK = ["--vocab", "64", "--rounds", "1", "--warmup", "0", "--frequencies", "2"]


def results(folder):
    return json.loads((folder / "bench.json").read_text())["results"]


def test_tables_json_and_picture(tmp_path, capsys):
    words = [*QUICK, "--solvers", "eigen", "newton_db", "--precisions", "fp32", "bf16"]
    words += ["--blocks", "128", "--peers", "AdamW", "--out", str(tmp_path)]
    assert main(["bench", *words]) == 0
    out = capsys.readouterr().out
    found = results(tmp_path)
    names = [(x["setting"], x["name"]) for x in found]
    ours = ["layer_wise", "whole", "AdamW"]
    assert names == [
        *(("eigen", name) for name in ["base", *ours]),
        *(("newton_db fp32", name) for name in ours),  # the base has no Newton-DB
        *(("newton_db bf16", name) for name in ours),
    ]
    for one in found:
        assert all(value > 0 for value in one["milliseconds"])
        assert bool(one["phases"]) == (one["name"] != "AdamW")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "README.md").read_text() in out
    assert "÷ base" in out


def test_the_papers_table_stands_beside_ours(tmp_path, monkeypatch, capsys):
    import experiments.bench_report as bench_report

    # Its rows are for blocks of 1024 and 2048, too large for a test: the figures of one stand in.
    figures = {(64, s, f): v for (b, s, f), v in bench_report.PAPER_MS.items() if b == 1024}
    monkeypatch.setattr(bench_report, "PAPER_MS", figures)
    words = ["--paper", "--model", "tiny", "--share", "2", "--blocks", "64", *QUICK]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| 64, ")]
    assert len(rows) == 6
    assert "558 / –" in next(row for row in rows if "ndb_fp32" in row)
    (newton,) = [row for row in rows if "cn_fp32" in row]
    assert all(float(cell.split("/")[1]) > 0 for cell in newton.split("|")[2:6])
    assert "the part of one of 2" in out


def test_the_part_of_a_rank():
    shapes = [shape for shape, count in llama(2, 128, 512, 352) for _ in range(count)]
    whole = blocks_of_rank(shapes, 64, 1)
    assert sum(math.prod(shape) for _, shape in whole) == sum(map(math.prod, shapes))
    part = blocks_of_rank(shapes, 64, 4)
    assert len(whole) / 4 <= len(part) <= len(whole) / 4 + 12
    assert {number for number, _ in part} <= set(range(len(shapes)))


@pytest.mark.parametrize("cls", [dash_shampoo.DistributedShampoo, dash_shampoo.DashShampoo])
def test_phases_add_up_and_leave_no_trace(cls):
    parameters = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(4)]
    optimizer = cls(
        parameters,
        max_preconditioner_dim=64,
        grafting_config=dash_shampoo.AdamPreconditionerConfig(),
    )
    for parameter in parameters:
        parameter.grad = torch.randn(64, 64)
    optimizer.step()
    lists = optimizer._per_group_state_lists[0]
    before = {key: set(vars(part)) for key, part in lists.items() if hasattr(part, "__dict__")}
    found = phase_milliseconds(optimizer, 3, torch.device("cpu"))
    assert tuple(found) == PHASES
    assert min(found.values()) > 0
    assert found["roots"] > found["gather"]
    after = {key: set(vars(part)) for key, part in lists.items() if hasattr(part, "__dict__")}
    assert before == after
    assert of_groups(optimizer).step.__self__ is optimizer


@pytest.mark.distributed
def test_two_ranks_give_one_result(tmp_path):
    words = ["bench", *QUICK, "--solvers", "newton_db", "--blocks", "128", "--out", str(tmp_path)]
    ended = run_experiments(2, words, tmp_path)
    assert [one.status for one in ended] == [0, 0], ended
    assert "2 ranks" in ended[0].out
    assert ended[1].out == ""
    assert [x["name"] for x in results(tmp_path)] == ["layer_wise", "whole"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precisions", "fp8"], "--precisions fp8: one of fp32, tf32, fp16x3, fp16, bf16"),
        (["--device", "tpu9"], "device=tpu9"),
        (["--out", "/dev/null/x"], "--out /dev/null/x can't be made"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_every_list_can_be_measured(tmp_path):
    kinds = ["kl", "eigendecomposed", "soap_qr", "soap_rotation", "spectral_base", "sign"]
    words = [*QUICK, "--solvers", *kinds, "--blocks", "128", "--out", str(tmp_path)]
    assert main(["bench", *words, "--lists", "base", "whole"]) == 0
    found = [(x["setting"].split()[0], x["name"]) for x in results(tmp_path)]
    has_all = dash_shampoo.base.name == "meta"  # the embedded base itself has inverse roots alone
    assert found == [
        (kind, name)
        for kind in kinds
        for name in ("base", "whole")
        if name == "whole" or (has_all and kind != "soap_rotation")
    ]
