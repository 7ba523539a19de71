"""Parts of rows are preconditioned as parameters of their own: by every list, in every process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dash_shampoo as ds
from tests.preconditioners.list_table import ROWS, Row, build, gradients, parameters

each_row = pytest.mark.parametrize("row", ROWS, ids=str)
# A parameter, its parts, and the shapes of those.
CASES = {
    "experts": ((3, 9, 7), 3, ((9, 7),) * 3),
    "fused": ((24, 8), (12, 8, 4), ((12, 8), (8, 8), (4, 8))),
    "stacked kernels": ((6, 3, 4, 5), 2, ((3, 3, 4, 5),) * 2),
}


def stepped(row: Row, params: list[Tensor], grads: list[list[Tensor]], **options: object) -> None:
    optimizer = build(row, [{"params": params, **options}], torch.float64)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()


@each_row
@pytest.mark.parametrize("case", CASES)
def test_parts_are_trained_as_parameters_of_their_own(row: Row, case: str) -> None:
    shape, row_parts, shapes = CASES[case]
    if not row.keys and "spectral" in row.name and case == "stacked kernels":
        row_parts, shapes = 6, ((3, 20),) * 6  # matrices alone
        shape = (6, 3, 20)
    whole = parameters((shape,), torch.float64)
    pieces = [
        torch.nn.Parameter(part.detach().clone().reshape(piece))
        for part, piece in zip(split(whole[0], row_parts), shapes, strict=True)
    ]
    all_grads = list(gradients((shape,), torch.float64, 4))
    stepped(row, whole, all_grads, row_parts=row_parts)
    cut = [
        [g.reshape(s) for g, s in zip(split(grads[0], row_parts), shapes, strict=True)]
        for grads in all_grads
    ]
    stepped(row, pieces, cut)
    for part, piece in zip(split(whole[0], row_parts), pieces, strict=True):
        torch.testing.assert_close(part.reshape(piece.shape), piece, rtol=1e-9, atol=1e-11)


def split(tensor: Tensor, row_parts: int | tuple[int, ...]) -> tuple[Tensor, ...]:
    if isinstance(row_parts, int):
        return tensor.detach().chunk(row_parts)
    return tensor.detach().split(row_parts)


def test_the_memory_format_of_parts_does_not_matter() -> None:
    row = ROWS[0]
    values = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    grads = [[torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1))]]
    plain = torch.nn.Parameter(values.clone())
    last = torch.nn.Parameter(values.clone(memory_format=torch.channels_last))
    for param in (plain, last):
        stepped(row, [param], grads, row_parts=2)
    torch.testing.assert_close(plain, last)
    assert not torch.equal(plain, values)


@pytest.mark.parametrize(
    ("row_parts", "message"),
    [(5, "row_parts=5.*24 rows"), ((8, 8), r"row_parts=\(8, 8\).*24 rows")],
)
def test_parts_that_do_not_fit_are_refused(row_parts: object, message: str) -> None:
    param = torch.nn.Parameter(torch.ones(24, 8))
    with pytest.raises(ValueError, match=message):
        ds.DashShampoo([{"params": [param], "row_parts": row_parts}])
