"""The benchmark of spread refreshes measures every position of the interval."""

import pytest

from benchmarks import stagger
from benchmarks.cases import Case


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagger, "CASES", {"tiny": Case("tiny", [((8, 8), 6), ((4,), 2)], 8)})
    words = ["--case", "tiny", "--frequency", "3", "--intervals", "2"]
    rows = [line.split("|")[1:-1] for line in stagger.main(words).splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["all in one step", "a share in every step"]
    for row in rows:
        mean, slowest, ratio = map(float, row[1:])
        assert 0 < mean <= slowest
        assert ratio >= 1
