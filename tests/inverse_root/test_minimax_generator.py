"""The tables come from the committed generator: regenerated here, and compared with independent values."""

import pytest
import torch

from dash_shampoo.inverse_root.minimax_generator import design, fit, remez
from dash_shampoo.inverse_root.minimax_plan import lower_end
from dash_shampoo.inverse_root.minimax_tables import TABLES

MARGIN = 0.02
# Composed minimax quartics and quadratics found by another program; a_0 first. Each but the last is
# divided by (1 + E)(1 + margin)^(1/p), and the next interval starts at ((1 - E)/(1 + E))^p.
CHECK_VALUES = [
    (4, 1e-3, (
        (3.02578139, -23.5716986, 82.7564004, -111.395861, 50.1804393),
        (2.24978691, -5.79984239, 12.7051534, -13.1972004, 5.05296105),
    ), 1.09e-2),
    (4, 1e-4, (
        (2.37248875, -6.69371311, 5.31628594),
        (2.88981741, -19.0450213, 63.7551812, -83.9276514, 37.3227356),
        (1.99040145, -3.44813908, 5.72644465, -4.89170534, 1.6244443),
    ), 1.45e-3),
    (2, 1e-4, (
        (7.40204988, -70.6786178, 233.448972, -298.989896, 129.80764),
        (6.56431357, -50.7320715, 156.241148, -193.256864, 82.1736214),
        (3.64747841, -10.0579185, 17.3524015, -14.8099729, 4.87156399),
    ), 3.6e-3),
]  # fmt: skip


@pytest.mark.parametrize(("root", "epsilon", "chain", "error"), CHECK_VALUES)
def test_remez_finds_the_known_chains(root, epsilon, chain, error):
    lower = lower_end(epsilon, MARGIN)
    for number, expected in enumerate(chain):
        coefficients, worst = remez(len(expected) - 1, float(root), lower)
        scale = 1.0
        if number < len(chain) - 1:
            scale = (1.0 + worst) * (1.0 + MARGIN) ** (1.0 / root)
        found = torch.tensor(coefficients) / scale
        torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-4, atol=1e-4)
        lower = ((1.0 - worst) / (1.0 + worst)) ** root / (1.0 + MARGIN)
    assert worst == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    "table", TABLES[:: max(len(TABLES) // 5, 1)], ids=lambda t: f"p{t.root}-{t.error:g}"
)
def test_fitting_a_table_anew_leaves_it_where_it_is(table):
    _, error = fit(table.ladder, float(table.root), table.lower)
    assert error <= 1.02 * table.error
    assert error >= 0.9 * table.error


def test_a_design_from_nothing_comes_near_the_table():
    table = next(t for t in TABLES if t.root == 2 and t.relative_epsilon == 1e-3)
    ladder, error = design(table.ladder.num_matmuls, 2.0, table.lower)
    assert ladder.num_matmuls == table.ladder.num_matmuls
    assert 0.95 * table.error <= error <= 1.5 * table.error
