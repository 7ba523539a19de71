"""The benchmark of the checks leaves them out where it says so."""

import pytest
import torch

from benchmarks import checks
from benchmarks.cases import Case


def test_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CASES", {"146-of-64": Case("tiny", [((8, 8), 3), ((4,), 1)], 8)})
    text = checks.main(["--rounds", "20"])
    assert "with ÷ without checks" in text


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
