"""The tables of minimax come from the committed search: fitted anew, and searched from a neighbour."""

from __future__ import annotations

from fractions import Fraction

import pytest

from dash_shampoo.inverse_root.minimax.tables import tables_of
from tools.minimax import search, tables

CASES = [(root, k) for root in ("2", "4", "8/3") for k in (4, 6, 8)]


def _table(root: str, k: int, epsilon: float = 1e-3):
    return next(
        table
        for table in tables_of(Fraction(root))
        if table.relative_epsilon == epsilon and table.num_squarings == k
    )


@pytest.mark.parametrize(("root", "k"), CASES)
def test_fitting_a_table_anew_leaves_it_where_it_is(root, k):
    table = _table(root, k)
    _, error = search.fit(table.ladder, float(table.root), table.lower)
    assert 0.9 * table.error <= error <= 1.02 * table.error


def test_a_ladder_is_found_again_from_its_neighbours():
    key = (Fraction(2), 1e-3, 5)
    found = tables.read()
    before = found.pop(key)[0]
    tables.improve(found, key, seed=0)
    error, ladder = found[key]
    assert ladder.num_squarings == 5
    assert 0.95 * before <= error <= 1.3 * before


def test_writing_what_was_read_changes_nothing(tmp_path, monkeypatch):
    found = {key: value for key, value in tables.read().items() if key[0] == 2 and key[1] >= 1e-3}
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.write(found)
    again = tables.read()
    assert set(again) == set(found)
    for key, (error, ladder) in found.items():
        assert again[key][0] == pytest.approx(error, rel=0.02)
        assert again[key][1](search.nodes(1e-3, 50)).tolist() == pytest.approx(
            ladder(search.nodes(1e-3, 50)).tolist(), rel=1e-6
        )


def test_the_normal_form_has_the_same_values():
    ladder = _table("2", 6).ladder
    x = search.nodes(1e-3, 200)
    normal = search.normalized(ladder, 1e-3)
    assert normal(x).tolist() == pytest.approx(ladder(x).tolist(), rel=1e-9)
    rung = x
    for a, b, c in normal.rungs:
        rung = a * rung.square() + b * x + c
        assert a > 0.0
        assert float(rung.abs().max()) <= 1.01
