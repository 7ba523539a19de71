"""The benchmark of the checks leaves them out where it says so."""

from pathlib import Path

import pytest
import torch

from benchmarks import checks
from benchmarks.cases import Case


def test_the_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "CASES", {"146-of-64": Case("tiny", [((8, 8), 3), ((4,), 1)], 8)})
    words = ["--rounds", "20", "--output", str(tmp_path / "checks.md")]
    texts = [checks.main(words) for _ in range(2)]
    assert all("with ÷ without checks" in text for text in texts)
    title, _, head, _, *lines = (tmp_path / "checks.md").read_text().splitlines()
    assert title.startswith("# ")
    assert "`python benchmarks/checks.py --rounds 20" in head
    assert lines == [f"- {text}" for text in texts]


@pytest.mark.parametrize("is_checked", [True, False])
def test_without_checks_nothing_is_noticed(is_checked: bool) -> None:
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = checks.Unchecked([param], lr=0.1, precondition_frequency=1)
    param.grad = torch.ones(4, 4)
    optimizer.step()
    param.data = torch.ones(4, 4)  # other memory
    optimizer.is_checked = is_checked
    optimizer.step()
    assert bool((param != 1).any()) == is_checked
