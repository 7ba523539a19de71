"""`param_groups`: which parameter goes where, and that the optimizer takes it and does what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dash_shampoo as ds
from dash_shampoo import ParamRule, param_groups


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)


class Experts(nn.Module):
    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num, width, 2 * width))


class Model(nn.Module):
    """One of each kind."""

    def __init__(self, width: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.norm = nn.LayerNorm((2, width))
        self.attention = Attention(width)
        self.experts = Experts(3, width)
        self.column = nn.Parameter(torch.randn(width, 1))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.lm_head = nn.Linear(width, 20, bias=True)
        if tied:
            self.lm_head.weight = self.embedding.weight


def where(groups: ds.ParamGroups) -> dict[str, str]:
    return {
        name: kind
        for kind, group in zip(groups.names, groups, strict=True)
        for name, _ in group["params"]
    }


def with_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def test_every_parameter_goes_where_its_kind_belongs() -> None:
    assert where(param_groups(Model())) == {
        "attention.qkv.weight": "matrices",
        "attention.out.weight": "matrices",
        "experts.weight": "matrices",
        "lm_head.weight": "heads",
        "embedding.weight": "embeddings",
        "norm.weight": "vectors",
        "norm.bias": "vectors",
        "attention.qkv.bias": "vectors",
        "column": "vectors",
        "scalar": "vectors",
        "lm_head.bias": "vectors",
    }


def test_options_are_those_of_the_kind() -> None:
    adam = ds.AdamPreconditionerConfig(beta2=0.9, epsilon=1e-6)
    groups = param_groups(
        Model(), matrices={"lr": 0.1}, heads={"lr": 0.2}, vectors={"lr": 0.3}, adam=adam
    )
    by_name = dict(zip(groups.names, groups, strict=True))
    assert list(by_name) == ["matrices", "heads", "embeddings", "vectors"]
    assert set(by_name["matrices"]) == {"lr", "params"}
    for name in ("heads", "embeddings", "vectors"):
        assert by_name[name]["preconditioner_config"] is adam
        assert by_name[name]["grafting_config"] is None
        assert by_name[name]["max_preconditioner_dim"] == math.inf
    assert [by_name[n].get("weight_decay") for n in by_name] == [None, None, None, 0.0]
    assert [by_name[n].get("lr") for n in by_name] == [0.1, 0.2, None, 0.3]


@pytest.mark.parametrize("kind", ["heads", "embeddings"])
def test_shared_weights_are_taken_once(kind: str) -> None:
    model = Model(tied=True)
    head_names = ds.grouping.HEAD_NAMES if kind == "heads" else ()
    found = where(param_groups(model, head_names=head_names))
    assert found["embedding.weight"] == kind
    assert "lm_head.weight" not in found
    assert len(found) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.embedding.requires_grad_(False)
    assert "embedding.weight" not in where(param_groups(model))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(model.requires_grad_(False))


def test_rules_come_first_in_their_order_and_by_names_modules_and_dimensions() -> None:
    rules = [
        ParamRule(name="scalars", max_dims=0, options={"lr": 1.0}),
        ParamRule(name="experts", modules=(Experts,), batch_first=False),
        ParamRule(name="attention", names=("attention.*",), max_dims=None),
    ]
    found = where(param_groups(Model(), rules=rules))
    assert found["scalar"] == "scalars"
    assert found["experts.weight"] == "experts"
    assert found["attention.qkv.bias"] == "attention"
    assert found["norm.bias"] == "vectors"
    both = ParamRule(name="both", names=("*.weight",), modules=(nn.Linear,))
    found = where(param_groups(Model(), rules=[both]))
    assert {name for name, kind in found.items() if kind == "both"} == {
        "attention.qkv.weight",
        "attention.out.weight",
        "lm_head.weight",
    }


def build(model: nn.Module, groups: list[dict[str, object]], **options: object) -> ds.DashShampoo:
    return ds.DashShampoo(
        groups,
        **{
            **dict(
                lr=0.1,
                betas=(0.9, 0.95),
                epsilon=1e-8,
                weight_decay=0.1,
                max_preconditioner_dim=64,
                precondition_frequency=1,
                preconditioner_config=ds.RootInvShampooPreconditionerConfig(),
            ),
            **options,
        },
    )


def shapes_of_factors(optimizer: ds.DashShampoo, param: Tensor) -> list[list[int]]:
    """Sizes N of the factor matrices of every block of a parameter."""
    blocks = [v for v in optimizer.state[param].values() if isinstance(v, dict) and "shampoo" in v]
    sizes = []
    for block in blocks:
        record = block["shampoo"]  # a dict on the embedded base, an object on Meta's
        factors = record["factor_matrices"] if isinstance(record, dict) else record.factor_matrices
        factors = factors.values() if isinstance(factors, dict) else factors
        numels = [f.numel() for f in factors]
        sizes.append([(math.isqrt(8 * n + 1) - 1) // 2 for n in numels])
    return sizes


def test_all_but_matrices_are_trained_by_adam_and_vectors_without_decay() -> None:
    """Five steps of the optimizer against torch's AdamW, for the groups that are Adam's."""
    torch.manual_seed(0)
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    optimizer = build(model, param_groups(model))
    vectors, rest = [], []
    for (name, kind), param in zip(
        where(param_groups(other)).items(),
        [p for g in param_groups(other) for _, p in g["params"]],
        strict=True,
    ):
        del name
        if kind != "matrices":
            (vectors if kind == "vectors" else rest).append(param)
    adamw = torch.optim.AdamW(
        [{"params": rest}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
    )
    for step in range(5):
        with_gradients(model, step)
        with_gradients(other, step)
        optimizer.step()
        adamw.step()
    kinds = where(param_groups(model))
    theirs = dict(other.named_parameters())
    for name, param in model.named_parameters():
        same = torch.allclose(param, theirs[name], rtol=1e-4, atol=1e-5)
        assert same == (kinds[name] != "matrices"), name


def test_fused_matrices_are_preconditioned_in_parts() -> None:
    for row_parts, rows in ((3, (8, 8, 8)), ((16, 4, 4), (16, 4, 4))):
        model = Model()
        rule = ParamRule(name="qkv", names=("*.qkv.weight",), row_parts=row_parts)
        optimizer = build(model, param_groups(model, rules=[rule]), max_preconditioner_dim=16)
        found = shapes_of_factors(optimizer, model.attention.qkv.weight)
        assert found == [[number, 8] for number in rows]


def test_one_rule_makes_a_group_for_every_number_of_matrices() -> None:
    model = nn.ModuleList([Experts(2, 4), Experts(3, 4), Experts(2, 8)])
    rule = ParamRule(name="experts", modules=(Experts,), batch_first=True)
    groups = param_groups(model, rules=[rule])
    assert groups.names == ("experts", "experts")
    assert [group["row_parts"] for group in groups] == [2, 3]


@pytest.mark.parametrize(
    "config",
    [ds.RootInvShampooPreconditionerConfig(), ds.EigenvalueCorrectedShampooPreconditionerConfig()],
    ids=lambda config: type(config).__name__,
)
def test_every_expert_has_factors_of_its_own(config: ds.PreconditionerConfig) -> None:
    model = Model()
    rule = ParamRule(
        name="experts",
        modules=(Experts,),
        batch_first=True,
        options={"preconditioner_config": config},
    )
    groups = param_groups(model, rules=[rule])
    optimizer = build(model, groups, max_preconditioner_dim=16)
    assert shapes_of_factors(optimizer, model.experts.weight) == [[8, 16]] * 3
    with_gradients(model)
    optimizer.step()
    report = groups.report(max_preconditioner_dim=16)
    assert "experts: 1 tensors, 384 scalars, 3 blocks, " in report
    assert "    row_parts=3" in report


def test_the_report_says_what_went_where_and_what_it_costs() -> None:
    groups = param_groups(Model())
    report = groups.report(max_preconditioner_dim=8)
    # Three blocks of the fused weight, one of out, six of the experts (3, 8, 16 → 8).
    assert "matrices: 3 tensors, 640 scalars, " in report
    assert "embeddings: 1 tensors, 160 scalars, 1 blocks, " in report
    assert "    attention.qkv.weight (24, 8)" in report
    assert "weight_decay=0.0" in report
    assert str(groups) == groups.report()
    lines = [line for line in report.splitlines() if line.startswith("matrices")]
    plan = ds.planning.plan_optimizer([groups[0]], max_preconditioner_dim=8)
    assert f"{plan.ranks[0].num_blocks:,} blocks" in lines[0]
    assert f"{plan.ranks[0].total_state_bytes:,} bytes" in lines[0]


def test_a_model_on_the_meta_device_can_be_split() -> None:
    with torch.device("meta"):
        model = Model()
    assert len(where(param_groups(model))) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([ParamRule(name="x", names=("nothing",))], "'x' takes no parameter"),
        ([ParamRule(name="heads", max_dims=1)], "'heads' of a rule is taken"),
        ([ParamRule(name="x", max_dims=1)] * 2, "'x' of a rule is taken"),
        ([ParamRule(name="x", names=("*qkv.weight",), row_parts=5)], "row_parts=5.*24 rows.*qkv"),
        (
            [ParamRule(name="x", names=("*qkv.weight",), row_parts=(8, 8))],
            r"row_parts=\(8, 8\).*24 rows",
        ),
        (
            [ParamRule(name="x", names=("*qkv.weight",), batch_first=True)],
            r"3 dimensions.*\(24, 8\)",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules: list[ParamRule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(Model(), rules=rules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "would take every parameter"),
        ({"names": "*.weight"}, "names='.*' in the rule 'x': must be a tuple"),
        ({"names": ("*",), "row_parts": 0}, "row_parts=0"),
        ({"names": ("*",), "row_parts": (4, 0)}, r"row_parts=\(4, 0\)"),
        (
            {"names": ("*",), "row_parts": 3, "batch_first": True},
            "row_parts=3.*None with batch_first",
        ),
        ({"names": ("*",), "options": {"params": []}}, "must not hold 'params'"),
    ],
)
def test_bad_rules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParamRule(name="x", **arguments)  # type: ignore[arg-type]
