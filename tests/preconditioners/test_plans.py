"""Plans of every list: the bytes of its state exactly, and what its products cost."""

from __future__ import annotations

import math

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.planning.solver_cost import eigenbasis_cost
from tests.preconditioners.list_table import ROWS, Row, build, flat, parameters


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_state_is_priced_to_the_byte(row: Row) -> None:
    params = parameters(row.shapes, torch.float32)
    optimizer = build(row, params, torch.float32)
    settings = dict(lr=0.02, betas=(0.9, 0.95), epsilon=row.epsilon, max_preconditioner_dim=8)
    plan = ds.plan_optimizer(
        params, **{**settings, "preconditioner_config": row.config(torch.float32), **row.options}
    )
    tensors = flat(optimizer.state_dict()["state"])
    held = sum(t.numel() * t.element_size() for p, t in tensors.items() if "/block" in p)
    planned = {k: v for k, v in plan.ranks[0].state_bytes.items() if k != ds.planning.SHARED}
    assert sum(planned.values()) == held
    names = {"factor_matrices", "inv_factor_matrices", "corrected_eigenvalues"}
    assert (set(planned) & names) == (set(row.keys) & names)


def test_products_are_counted_by_method() -> None:
    n = 64
    options = dict(max_preconditioner_dim=n, precondition_frequency=1, betas=(0.9, 0.95))

    def flops(config: ds.PreconditionerConfig) -> tuple[float, float, float, float]:
        params = [torch.nn.Parameter(torch.zeros(n, n))]
        step = ds.plan_optimizer(params, preconditioner_config=config, **options).ranks[0].step
        return (
            step.factor_update_flops / (2 * n**3),
            step.precondition_flops / (2 * n**3),
            step.inverse_root_flops / (2 * n**3),
            step.eigendecomposition_flops / n**3,
        )

    assert flops(ds.DashSOAPPreconditionerConfig()) == (2, 6, 8, 0)
    assert flops(ds.EigendecomposedShampooPreconditionerConfig()) == (2, 4, 0, 18)
    assert flops(ds.EigenvalueCorrectedShampooPreconditionerConfig())[1:] == (6, 0, 18)
    assert flops(ds.SignDescentPreconditionerConfig()) == (0, 0, 0, 0)
    # Beside its own outer product each factor has one product with the other's root, or two.
    assert flops(ds.RootInvKLShampooPreconditionerConfig())[:2] == (4, 2)
    assert flops(ds.EigendecomposedKLShampooPreconditionerConfig())[:2] == (6, 4)


def test_orthogonalisations_are_priced_by_their_products() -> None:
    def flops(method: ds.OrthogonalizationConfig) -> tuple[float, float]:
        config = ds.SpectralDescentPreconditionerConfig(orthogonalization_config=method)
        step = (
            ds.plan_optimizer(
                [torch.nn.Parameter(torch.zeros(128, 64))],
                preconditioner_config=config,
                max_preconditioner_dim=math.inf,
                distributed_config=ds.SingleDeviceDistributedConfig(
                    target_parameter_dimensionality=2
                ),
            )
            .ranks[0]
            .step
        )
        assert step.factor_update_flops == step.inverse_root_flops == 0.0
        return step.precondition_flops / (2 * 64**3), step.eigendecomposition_flops / 64**3

    # For 128×64 a step is two products of 4·64³ flops and one of 2·64³.
    assert flops(ds.MuonOrthogonalizationConfig()) == (5 * 5, 0)
    assert flops(ds.MinimaxPolarConfig(num_iterations=4)) == (5 * 4, 0)
    assert flops(ds.SVDOrthogonalizationConfig()) == (2, 14 * 2 + 8)
    squares = ds.GramOrthogonalizationConfig(root_inv_config=ds.MinimaxConfig(num_squarings=5))
    products, decompositions = flops(squares)
    assert 4 + 5 <= products < 4 + 10
    assert decompositions == 0


def test_methods_of_eigenbases_cost_what_their_docstrings_say() -> None:
    qr = ds.QREigendecompositionConfig
    assert eigenbasis_cost(qr()).num_matmuls == pytest.approx(3 + 4 / 3)
    assert eigenbasis_cost(qr(max_iterations=3)).num_matmuls == pytest.approx(2 + 3 * 7 / 3 + 2)
    assert eigenbasis_cost(qr(tolerance=0.1)).depends_on_data
    assert eigenbasis_cost(ds.OrthogonalIterationConfig(num_iterations=2)).num_matmuls == 8.0
    assert eigenbasis_cost(ds.EighEigendecompositionConfig()).num_eigendecompositions == 1.0


def test_the_groups_of_a_model_by_soap_say_what_they_hold() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    soap = {"preconditioner_config": ds.DefaultDashSOAPConfig, "grafting_config": None}
    groups = ds.param_groups(model, matrices=soap)
    report = groups.report(max_preconditioner_dim=math.inf)
    # Two factors and two bases of 64, the second moment and the average of 64 numbers each.
    held = 4 * (4 * 64 + 2 * 64)
    line = next(line for line in report.splitlines() if line.startswith("matrices"))
    assert int(line.split(" bytes")[0].split()[-1].replace(",", "")) >= held
    assert "can't be planned" not in report
