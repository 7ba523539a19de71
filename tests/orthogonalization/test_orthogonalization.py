"""Tests of every orthogonalisation: accuracy, identities, isolation of blocks, extremes, the table."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dash_shampoo import MinimaxConfig, NewtonDBConfig, base
from dash_shampoo.base import (
    NewtonSchulzOrthogonalizationConfig,
    OrthogonalizationConfig,
    SVDOrthogonalizationConfig,
)
from dash_shampoo.orthogonalization import (
    GramOrthogonalizationConfig,
    MinimaxPolarConfig,
    MuonOrthogonalizationConfig,
    check_orthogonalization_supported,
    match_rms_adamw,
    muon_original,
    orthogonalize,
)
from dash_shampoo.orthogonalization.polar_table import QUINTICS
from tests.reference.inverse_root import random_orthogonal
from tools import polar_table

SHAPES = ((1, 1), (4, 4), (8, 2), (2, 8), (16, 6), (6, 16))


def unscaled(d_in: int, d_out: int) -> float:
    del d_in, d_out
    return 1.0


@dataclass(frozen=True)
class Row:
    """A method, the singular values that it is given, and where they have to end.

    Attributes:
        name: Unique.
        config: The method.
        smallest: The smallest singular value of the test matrices, relative to the largest.
        interval: Where all of them end.
        why: Where that comes from.
        rounding: Relative error of the iteration's arithmetic, for identities.
    """

    name: str
    config: OrthogonalizationConfig
    smallest: float
    interval: tuple[float, float]
    why: str
    rounding: float = 1e-3


HALF = "bf16 keeps 8 bits, and 15 products in a row"
METHODS = (
    Row("svd", SVDOrthogonalizationConfig(), 1e-3, (1 - 1e-5, 1 + 1e-5), "round-off of the SVD"),
    Row(
        "newton_schulz",
        NewtonSchulzOrthogonalizationConfig(),
        2e-2,
        (0.65, 1.25),
        "Muon's coefficients do not converge, they end in this interval",
    ),
    Row(
        "newton_schulz_converging",
        NewtonSchulzOrthogonalizationConfig(num_iterations=20, coefficients=(1.875, -1.25, 0.375)),
        1e-3,
        (1 - 1e-4, 1 + 1e-4),
        "the slope 1.875 at 0 takes 1e-3/√N to 1 in 14 steps, then cubic convergence",
    ),
    Row("muon", MuonOrthogonalizationConfig(), 2e-2, (0.6, 1.3), HALF, rounding=0.1),
    Row(
        "minimax_polar",
        MinimaxPolarConfig(compute_dtype=torch.float32),
        1e-2,
        (1 - 0.1248, 1 + 0.1248),
        "the table's error after five steps from 1e-3, 0.1247",
    ),
    Row(
        "minimax_polar_to_the_end",
        MinimaxPolarConfig(
            compute_dtype=torch.float32, num_iterations=8, smallest_singular_value=1e-4
        ),
        1e-3,
        (1 - 1e-4, 1 + 1e-4),
        "the table's error after eight steps from 1e-4",
    ),
    Row("minimax_polar_bf16", MinimaxPolarConfig(), 1e-2, (0.8, 1.2), HALF, rounding=0.1),
    Row(
        "gram_newton_db",
        GramOrthogonalizationConfig(root_inv_config=NewtonDBConfig(num_iterations=20)),
        1e-1,
        (1 - 1e-3, 1 + 1e-3),
        "converged; the Gram matrix squares the condition number",
    ),
    Row(
        "gram_minimax",
        GramOrthogonalizationConfig(root_inv_config=MinimaxConfig(relative_epsilon=1e-4)),
        1e-1,
        (1 - 6e-2, 1 + 6e-2),
        "1/√(1 + 1e-4/1e-2), and the default accuracy 5e-2 of the polynomial",
    ),
)
each_row = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
few_examples = settings(max_examples=4, deadline=None, derandomize=True)


def plain(row: Row) -> OrthogonalizationConfig:
    return replace(row.config, scale_by_dims_fn=unscaled)


def matrices(
    num: int, shape: tuple[int, int], smallest: float, seed: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G = U·diag(σ)·Vᵀ in float32 with log-spaced σ in [smallest, 1]·scale, and its factors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(shape)
    U = random_orthogonal(num, shape[0], generator)[:, :, :rank]
    V = random_orthogonal(num, shape[1], generator)[:, :, :rank]
    sigma = scale * torch.logspace(math.log10(smallest), 0, rank, dtype=torch.float64)
    return ((U * sigma) @ V.mT).float(), U, sigma, V


def test_the_table_is_not_empty_and_names_are_unique() -> None:
    names = [row.name for row in METHODS]
    assert len(names) >= 9
    assert len(set(names)) == len(names)


@each_row
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_singular_values_end_near_1_and_singular_vectors_stay(
    row: Row, shape: tuple[int, int], scale: float
) -> None:
    if type(row.config) is NewtonSchulzOrthogonalizationConfig and scale < 1e-8:
        pytest.skip("the base's takes norms below 1e-8 for 1e-8")
    G, U, _, V = matrices(5, shape, row.smallest, seed=0, scale=scale)
    result = orthogonalize(G, plain(row)).double()
    assert result.shape == G.shape
    inner = U.mT @ result @ V
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert float(diagonal.min()) >= row.interval[0]
    assert float(diagonal.max()) <= row.interval[1]
    # Nothing between different singular vectors, and nothing outside of G's range.
    off = torch.linalg.vector_norm(inner - torch.diag_embed(diagonal), dim=(-2, -1))
    assert float(off.max()) <= row.rounding * min(shape)
    outside = result.square().sum((-2, -1)) - inner.square().sum((-2, -1))
    assert float(outside.abs().max()) <= row.rounding * min(shape)


@each_row
def test_the_transpose_comes_out_transposed(row: Row) -> None:
    G, *_ = matrices(3, (8, 5), row.smallest, seed=1)
    transposed, result = orthogonalize(G.mT, plain(row)), orthogonalize(G, plain(row)).mT
    if row.name == "svd":  # LAPACK's, on another matrix
        assert torch.allclose(transposed, result, atol=1e-4)
    else:
        assert torch.equal(transposed, result)


@each_row
@few_examples
@given(seed=st.integers(0, 2**31), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_bad_matrix_leaves_the_others_bit_identical(row: Row, seed: int, bad: float) -> None:
    G, *_ = matrices(6, (8, 4), row.smallest, seed)
    poisoned = G.clone()
    poisoned[2, 7, 0] = bad
    expected, result = orthogonalize(G, plain(row)), orthogonalize(poisoned, plain(row))
    others = torch.arange(6) != 2
    assert torch.equal(result[others], expected[others])
    assert bool(result[2].isnan().all())


@each_row
def test_each_matrix_is_treated_as_if_alone(row: Row) -> None:
    G, *_ = matrices(7, (16, 8), row.smallest, seed=2)
    together = orthogonalize(G, plain(row))
    alone = torch.cat([orthogonalize(G[i : i + 1], plain(row)) for i in range(7)])
    assert torch.equal(together, alone)


@each_row
def test_zeros_give_nothing_that_is_not_finite(row: Row) -> None:
    result = orthogonalize(torch.zeros(2, 6, 4), plain(row))
    if row.name == "svd":  # as the base's: the singular vectors of 0 are arbitrary
        assert torch.allclose(result.mT @ result, torch.eye(4).expand(2, 4, 4))
    else:
        assert torch.equal(result, torch.zeros(2, 6, 4))


@each_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_has_the_dtype_of_the_gradient(row: Row, dtype: torch.dtype) -> None:
    G, U, _, V = matrices(3, (8, 4), 0.3, seed=3)
    result = orthogonalize(G.to(dtype), plain(row))
    assert result.dtype == dtype
    diagonal = (U.mT @ result.double() @ V).diagonal(dim1=-2, dim2=-1)
    assert float((diagonal - 1).abs().max()) <= max(1 - row.interval[0], 0.1) + 0.1


@each_row
def test_the_scale_is_a_function_of_columns_and_rows(row: Row) -> None:
    G, *_ = matrices(2, (9, 4), row.smallest, seed=4)
    scaled = orthogonalize(G, replace(row.config, scale_by_dims_fn=muon_original))
    assert torch.allclose(scaled, 1.5 * orthogonalize(G, plain(row)), rtol=1e-2)
    config = pickle.loads(pickle.dumps(replace(row.config, scale_by_dims_fn=match_rms_adamw)))
    assert torch.allclose(orthogonalize(G, config), 0.6 * orthogonalize(G, plain(row)), rtol=1e-2)


@each_row
def test_a_step_inside_autocast_computes_as_outside(row: Row) -> None:
    G, *_ = matrices(2, (8, 4), row.smallest, seed=5)
    expected = orthogonalize(G, plain(row))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalize(G, plain(row)), expected)


@each_row
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty_stacks(row: Row, shape: tuple[int, int, int]) -> None:
    assert orthogonalize(torch.zeros(shape), plain(row)).shape == shape


def test_an_svd_can_be_scaled_by_the_nuclear_norm() -> None:
    G, U, sigma, V = matrices(2, (6, 4), 0.1, seed=6)
    result = orthogonalize(G, SVDOrthogonalizationConfig(scale_by_nuclear_norm=True))
    assert torch.allclose(result.double(), sigma.sum() * U @ V.mT, rtol=1e-4, atol=1e-5)


def test_muon_in_bf16_is_torch_s_muon() -> None:
    """One step of torch.optim.Muon from 0 with the same gradient, but for bf16 sums in another order."""
    torch.manual_seed(0)
    for shape in ((32, 16), (16, 32)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        optimizer = torch.optim.Muon(
            [parameter],
            lr=1.0,
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizer.step()
        ours = orthogonalize(parameter.grad[None], MuonOrthogonalizationConfig())[0]
        assert float((parameter + ours).norm() / ours.norm()) < 0.03


# ---------------------------------------------------------------------------------- the table of quintics


def test_the_table_is_what_the_search_finds() -> None:
    assert polar_table.TABLE.read_text() == polar_table.render()
    assert len(QUINTICS) == len(polar_table.LOWER_ENDS)


@pytest.mark.parametrize("lower_end", polar_table.LOWER_ENDS)
def test_the_quintics_are_as_good_as_the_search_says_and_no_other_is_better(lower_end: str) -> None:
    x = torch.linspace(float(lower_end), 1.0, 100_001, dtype=torch.float64)
    lower, upper = float(lower_end), 1.0
    for (a, b, c), (_, error) in zip(
        QUINTICS[float(lower_end)], polar_table.chain(lower_end), strict=True
    ):
        if error > 1e-5:
            # The best polynomial errs alternately at four points, by the same amount.
            t = torch.linspace(lower, 1.01 * upper, 200_001, dtype=torch.float64)
            residual = 1 - (a * t + b * t**3 + c * t**5)
            extremes = [float(residual[0]), float(residual.min()), float(residual[-1])]
            assert extremes == pytest.approx([error, -error, -error], rel=1e-4)
            first_minimum = int((residual <= -error * (1 - 1e-4)).nonzero()[0])
            inner = residual[first_minimum:]
            assert float(inner.max()) == pytest.approx(error, rel=1e-4)
        x = a * x + b * x**3 + c * x**5
        assert float((1 - x).abs().max()) <= error * (1 + 1e-6) + 1e-9
        lower, upper = 1 - error, 1 + error


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (MinimaxPolarConfig, {"num_iterations": 0}, r"num_iterations=0.*\[1, 8\]"),
        (MinimaxPolarConfig, {"num_iterations": 9}, "num_iterations=9"),
        (MinimaxPolarConfig, {"num_iterations": True}, "num_iterations=True"),
        (
            MinimaxPolarConfig,
            {"smallest_singular_value": 0.2},
            "smallest_singular_value=0.2.*0.001",
        ),
        (MinimaxPolarConfig, {"compute_dtype": torch.int8}, "compute_dtype=torch.int8"),
        (MuonOrthogonalizationConfig, {"compute_dtype": "bf16"}, "compute_dtype='bf16'"),
        (GramOrthogonalizationConfig, {"root_inv_config": None}, "NoneType"),
    ],
)
def test_bad_options_are_refused_by_name(
    config: type, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments)


def test_bad_input_is_refused_by_name() -> None:
    config = SVDOrthogonalizationConfig()
    with pytest.raises(ValueError, match=r"G must be a stack.*\(3, 3\)"):
        orthogonalize(torch.eye(3), config)
    with pytest.raises(ValueError, match=r"int64"):
        orthogonalize(torch.zeros(1, 3, 3, dtype=torch.int64), config)
    with pytest.raises(ValueError, match="No orthogonalisation takes str"):
        check_orthogonalization_supported("svd")  # type: ignore[arg-type]


@pytest.mark.skipif(base.name != "meta", reason="needs Meta's package")
@pytest.mark.parametrize(
    "config",
    [
        SVDOrthogonalizationConfig(),
        SVDOrthogonalizationConfig(scale_by_nuclear_norm=True, scale_by_dims_fn=muon_original),
        NewtonSchulzOrthogonalizationConfig(),
        NewtonSchulzOrthogonalizationConfig(num_iterations=3, scale_by_dims_fn=muon_original),
    ],
    ids=["svd", "svd, scaled", "newton_schulz", "newton_schulz, scaled"],
)
def test_matrices_come_out_as_meta_s(config: OrthogonalizationConfig) -> None:
    from distributed_shampoo.preconditioner.matrix_functions import matrix_orthogonalization

    for shape in SHAPES:
        G = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = torch.stack([matrix_orthogonalization(matrix, config) for matrix in G])
        assert torch.allclose(orthogonalize(G, config), expected, rtol=1e-10, atol=1e-12)
