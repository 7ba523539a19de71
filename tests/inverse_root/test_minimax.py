"""What minimax promises: tables and look-ups, products and errors on real factors, a true bound."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dash_shampoo as ds
from benchmarks.device_counts import DeviceCounts
from dash_shampoo.inverse_root import InverseRootStatus, check_supported, inverse_root
from dash_shampoo.inverse_root.minimax.solve import minimax, table_of
from dash_shampoo.inverse_root.minimax.tables import ROOTS, find_table, tables_of
from dash_shampoo.products import count_products

FACTORS = Path(__file__).parents[2] / "benchmarks" / "data" / "factors.pt"
# The largest relative error of the direction over the captured factors at a number of products.
BARS = [
    # root, relative epsilon, accuracy, products at most, error of the direction at most
    (4, 1e-3, 1.5e-2, 6, 1.2e-2),
    (4, 1e-4, 1.5e-2, 8, 1.3e-2),
    (4, 1e-4, 1e-3, 10, 1.5e-3),
    (4, 1e-4, 1.5e-4, 11, 2e-4),
    (4, 1e-6, 5.5e-3, 13, 7e-3),
    (2, 1e-3, 1.2e-3, 8, 1.5e-3),
    (2, 1e-4, 2.5e-3, 10, 3.5e-3),
]


def exact(A, root, damping):
    values, vectors = torch.linalg.eigh(A.double())
    powers = (values.clamp_min(0.0) + damping.double()[..., None]).pow(-1.0 / root)
    return (vectors * powers[..., None, :]) @ vectors.mT


def captured():
    for entry in torch.load(FACTORS):
        for left, right in entry["factors"].values():
            yield left, entry["G"], right


def direction_errors(root, config):
    """Relative error of L^(-1/p) G R^(-1/p) for each pair of captured factors."""
    for left, gradient, right in captured():
        roots = [inverse_root(A[None], root, config) for A in (left, right)]
        L, R = (
            exact(A[None], root, r.damping)[0] for A, r in zip((left, right), roots, strict=True)
        )
        expected = L @ gradient.double() @ R
        found = (roots[0].value[0] @ gradient @ roots[1].value[0]).double()
        yield float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("root", "epsilon", "accuracy", "products", "error"), BARS)
def test_errors_and_products_on_real_factors(root, epsilon, accuracy, products, error):
    config = ds.MinimaxConfig(relative_epsilon=epsilon, accuracy=accuracy)
    errors = list(direction_errors(root, config))
    assert len(errors) >= 10
    assert max(errors) <= error
    A = next(captured())[0][None]
    with count_products(num_blocks=1, size=A.shape[-1]) as count:
        inverse_root(A, root, config)
    assert count.num_products == count.num_symmetric <= products


ALL_TABLES = [table for root in ROOTS for table in tables_of(root)]


def test_the_tables_cover_what_they_are_for():
    assert [str(root) for root in ROOTS] == ["1", "2", "8/3", "3", "4", "6", "8", "10"]
    for root in ROOTS:
        tables = tables_of(root)
        dampings = sorted({table.relative_epsilon for table in tables}, reverse=True)
        assert dampings == [10.0**-e for e in range(2, 9)]
        for damping in dampings:
            own = [table for table in tables if table.relative_epsilon == damping]
            numbers = [table.num_squarings for table in own]
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), "no gaps"
            assert all(b.error < a.error for a, b in pairwise(own))
            assert numbers[0] >= 3
            assert numbers[-1] <= 16
            # Fewer squarings than the first are no approximation at all, more than the last no better.
            assert numbers[0] == 3 or own[0].error > 0.8
            assert numbers[-1] == 16 or own[-1].error < 1e-3
    for root in (2, 4):
        for damping in (1e-2, 1e-3, 1e-4):
            assert find_table(Fraction(root), damping, 0.02, 0.9, 3).num_squarings == 3


@pytest.mark.parametrize("root", ROOTS, ids=str)
def test_every_table_has_the_error_it_states(root):
    for table in tables_of(root):
        x = torch.logspace(math.log10(table.lower), 0.0, 20_001, dtype=torch.float64)
        error = (table.ladder(x) * x.pow(1.0 / float(root)) - 1.0).abs().max()
        assert 0.8 * table.error - 1e-9 <= error <= 1.01 * table.error + 1e-9, table


def test_a_coarser_accuracy_takes_fewer_products():
    for root, epsilon in ((2, 1e-4), (4, 1e-4), (2, 1e-6)):
        config = [
            ds.MinimaxConfig(relative_epsilon=epsilon, accuracy=accuracy)
            for accuracy in (0.5, 0.3, 0.05, 0.005)
        ]
        numbers = [table_of(c, Fraction(root)).num_squarings for c in config]
        assert numbers == sorted(set(numbers))
        for c, number in zip(config, numbers, strict=True):
            assert table_of(c, Fraction(root)).error <= c.accuracy
            direct = ds.MinimaxConfig(relative_epsilon=epsilon, num_squarings=number)
            assert table_of(direct, Fraction(root)).error <= c.accuracy


def test_a_look_up_takes_microseconds():
    table_of(ds.MinimaxConfig(), Fraction(2))
    started = time.perf_counter()
    for _ in range(100):
        table_of(ds.MinimaxConfig(), Fraction(2))
    # About 3 µs; a search would take seconds.
    assert (time.perf_counter() - started) / 100 < 1e-3


@pytest.mark.parametrize(
    ("config", "root", "message"),
    [
        (ds.MinimaxConfig(), 5, r"root=5 has no table .* nearest are 4 and 6"),
        (ds.MinimaxConfig(), 1.5, r"root=3/2 has no table .* nearest are 1 and 2 "),
        (ds.MinimaxConfig(), 0.5, r"root=1/2 has no table .* nearest are 1 "),
        (ds.MinimaxConfig(), 12, r"root=12 has no table .* nearest are 10 "),
        (
            ds.MinimaxConfig(accuracy=1e-9),
            2,
            r"accuracy=1e-09 is out of reach .* nearest is \S+, by",
        ),
        (
            ds.MinimaxConfig(num_squarings=3, relative_epsilon=1e-8),
            2,
            r"num_squarings=3 has no table .* nearest is \d+\.",
        ),
        (
            ds.MinimaxConfig(relative_epsilon=1e-8, margin=0.5),
            2,
            r"relative_epsilon=1e-08 with margin=0.5 .* smallest is 1e-08",
        ),
    ],
)
def test_what_no_table_serves_is_refused_with_the_nearest(config, root, message):
    with pytest.raises(ValueError, match=message):
        check_supported(config, root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy": 0.0}, "accuracy=0.0 in MinimaxConfig"),
        ({"accuracy": "0.1"}, "accuracy='0.1'"),
        ({"accuracy": math.nan}, "accuracy=nan"),
        ({"num_squarings": 2}, "num_squarings=2"),
        ({"num_squarings": 5.0}, "num_squarings=5.0"),
        ({"relative_epsilon": 1e-9}, "relative_epsilon=1e-09"),
        ({"matmul_precision": "fp8"}, "matmul_precision='fp8'"),
        ({"matmul_precision": ("fp32",)}, r"matmul_precision=\('fp32',\)"),
        ({"margin": 0.0}, "margin=0.0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        ds.MinimaxConfig(**options)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=24), st.integers(0, 9), st.floats(-30, 30)
)
def test_the_damping_shows_a_bound_that_is_never_below_the_largest_eigenvalue(
    spectrum, seed, scale
):
    values = torch.tensor(spectrum, dtype=torch.float64) * 10.0**scale
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)
    ).Q
    A = (basis * values) @ basis.T
    A = (A + A.T) / 2
    config = ds.MinimaxConfig(relative_epsilon=1e-3)
    bound = float(inverse_root(A, 4, config).damping) / 1e-3
    if values.max() > 1e-300:
        # A spectrum of two equal parts is the worst case, 2.25; 1 % for the margin of the measurement.
        assert 0.999999 * float(values.max()) <= bound <= 2.3 * float(values.max())


@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_extreme_scales_give_finite_roots(root, scale):
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(3, 32, 8, generator=generator)
    A = torch.cat([factor @ factor.mT, torch.eye(32)[None], torch.zeros(1, 32, 32)]) * scale
    A[2] = torch.outer(factor[2, :, 0], factor[2, :, 0]) * scale
    for num_squarings in (None, 5):
        config = ds.MinimaxConfig(num_squarings=num_squarings)
        result = inverse_root(A, root, config, residual_threshold=0.3)
        assert result.value.isfinite().all()
        assert not result.status.any()


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1.0])
def test_a_block_of_zeros_gives_the_damping_s_root(epsilon):
    result = inverse_root(torch.zeros(1, 8, 8), 2, ds.MinimaxConfig(), epsilon)
    expected = 1.0 if epsilon == 0.0 else epsilon**-0.5
    torch.testing.assert_close(result.value[0], expected * torch.eye(8), rtol=0.02, atol=0.0)


@pytest.mark.parametrize(
    ("precision", "epsilon", "error"),
    [
        ("fp32", 1e-6, 1.5e-2),
        ("fp16x3", 1e-6, 1.5e-2),  # 22 bits: as good as fp32
        ("tf32", 1e-3, 1.2e-2),
        ("tf32", 1e-4, 2e-2),  # 11 bits lift the smallest eigenvalues by about 5e-4 of the largest
        ("bf16", 1e-3, 1.2e-2),
        ("bf16", 1e-4, 3e-2),  # 8 bits
    ],
)
def test_the_floor_of_each_precision_on_real_factors(precision, epsilon, error):
    config = ds.MinimaxConfig(relative_epsilon=epsilon, matmul_precision=precision)
    assert max(direction_errors(4, config)) <= error


@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("num_squarings", [3, 4, 5, 6, 9])
def test_healthy_factors_raise_no_alarm_however_few_the_squares(root, num_squarings):
    """The residual of a root by few squares is large; the threshold knows what the polynomial promises."""
    for epsilon in (1e-3, 1e-4):
        config = ds.MinimaxConfig(relative_epsilon=epsilon, num_squarings=num_squarings)
        for left, _, right in captured():
            for A in (left, right):
                result = inverse_root(A, root, config, 1e-12, residual_threshold=0.3)
                assert result.status.tolist() == [InverseRootStatus.SUCCESS]


@pytest.mark.parametrize("num_squarings", [4, 5, 9])
def test_a_root_beyond_its_promise_raises_the_alarm(num_squarings):
    """An eigenvalue far below -δ makes the polynomial grow without bound."""
    config = ds.MinimaxConfig(relative_epsilon=1e-4, num_squarings=num_squarings)
    A = torch.diag(torch.logspace(0, -4, 32))[None].repeat(2, 1, 1)
    A[1, 20, 20] = -0.3
    result = inverse_root(A, 2, config, residual_threshold=0.3)
    assert result.status[0] == InverseRootStatus.SUCCESS
    assert result.status[1] in (InverseRootStatus.INACCURATE, InverseRootStatus.NON_FINITE_RESULT)


@pytest.mark.parametrize("num_squarings", [4, 5])
def test_of_2400_damaged_factors_no_wrong_root_by_few_squares_is_accepted(num_squarings):
    """Random spectra, moved by 1e-6 to 1 of their largest eigenvalue, as rounding or a bad gather may do."""
    generator = torch.Generator().manual_seed(0)
    config = ds.MinimaxConfig(relative_epsilon=1e-4, num_squarings=num_squarings)
    promised = table_of(config, Fraction(2)).error
    exponents = torch.randint(0, 9, (2400, 1), generator=generator)
    basis = torch.linalg.qr(torch.randn(2400, 32, 32, generator=generator, dtype=torch.float64)).Q
    spectra = 10.0 ** (-exponents * torch.linspace(0, 1, 32, dtype=torch.float64))
    sizes = 10.0 ** (-6 * torch.rand(2400, 1, generator=generator, dtype=torch.float64))
    moves = torch.randn(2400, 32, generator=generator, dtype=torch.float64) / 32**0.5
    spectra = spectra + sizes * moves
    A = ((basis * spectra[:, None, :]) @ basis.mT).float()

    result = inverse_root(A, 2, config, 1e-12, residual_threshold=0.3)
    is_flagged = result.status > InverseRootStatus.MAX_ITERATIONS
    damped = spectra.clamp_min(0.0) + result.damping.double()[:, None]
    # The largest relative error of an eigenvalue of the root.
    errors = (basis * damped.sqrt()[:, None, :]) @ basis.mT @ result.value.double()
    errors = errors.nan_to_num_(1e6, 1e6, -1e6).clamp_(-1e6, 1e6) - torch.eye(32)
    error = torch.linalg.matrix_norm(errors, 2)
    is_wrong, is_definite = error > promised + 0.25, (spectra >= 0.0).all(1)
    print(f"{int(is_wrong.sum())} wrong, {int((is_wrong & ~is_flagged).sum())} of them missed")
    assert is_wrong.sum() > 300
    assert not (is_wrong & ~is_flagged).any()
    assert is_definite.sum() > 600
    assert not (is_flagged & is_definite).any()


def test_of_2400_random_stacks_no_wrong_root_is_accepted():
    """What the residual misses, and what it flags without need, over many inputs."""
    generator = torch.Generator().manual_seed(0)
    solvers = [
        ds.MinimaxConfig(relative_epsilon=1e-4),
        ds.MinimaxConfig(relative_epsilon=1e-4, matmul_precision="bf16"),
        ds.NewtonDBConfig(),
        ds.CoupledNewtonConfig(max_iterations=10),
    ]
    wrong = missed = right = false_alarms = total = 0
    worst_missed = 0.0
    for _ in range(150):
        exponents = torch.randint(0, 9, (4,), generator=generator).tolist()
        basis = torch.linalg.qr(torch.randn(4, 32, 32, generator=generator, dtype=torch.float64)).Q
        spectra = torch.stack([torch.logspace(0, -e, 32, dtype=torch.float64) for e in exponents])
        A = ((basis * spectra[:, None, :]) @ basis.mT).float()
        for config in solvers:
            result = inverse_root(A, 4, config, 1e-6, residual_threshold=0.3)
            expected = exact(A, 4, result.damping)
            error = (result.value - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(
                dim=1
            )
            is_flagged = result.status > InverseRootStatus.MAX_ITERATIONS
            is_wrong = ~(error <= 0.1)
            wrong += int(is_wrong.sum())
            is_missed = is_wrong & ~is_flagged
            missed += int(is_missed.sum())
            worst_missed = max(worst_missed, *error[is_missed].tolist(), 0.0)
            right += int((error <= 0.03).sum())
            false_alarms += int(((error <= 0.03) & is_flagged).sum())
            total += len(A)
            assert torch.equal(
                is_flagged, ~(result.residual <= 0.3) | ~result.value.isfinite().all(-1).all(-1)
            )
    print(
        f"{total} roots: {wrong} off by more than 10 %, {missed} of them missed (the worst is off by "
        f"{worst_missed:.0%}); {right} within 3 %, {false_alarms} of them flagged"
    )
    assert total == 2400
    assert wrong > 100
    # A root that is off by 10 to 25 % in its few smallest eigenvalues alone can hide below the threshold.
    assert worst_missed <= 0.3
    assert missed <= 0.1 * wrong
    assert false_alarms <= 0.06 * right


@pytest.mark.skipif(find_spec("triton") is None, reason="the fused square needs triton")
@pytest.mark.parametrize("precision", ["fp32", "fp16x3", "tf32", "fp16", "bf16"])
def test_passes_beside_fused_products_on_an_accelerator(precision):
    A = torch.eye(64).expand(4, 64, 64).contiguous()
    config = ds.MinimaxConfig(relative_epsilon=1e-4, num_squarings=5, matmul_precision=precision)
    with DeviceCounts({}, default="solver") as device:
        device.place([A])
        minimax(A, Fraction(2), config, 0.0)  # the weights come from the host once
        device.reset()
        solution = minimax(A, Fraction(2), config, 0.0)
        counts = device.counts
    assert counts.operations["solver", "symmetric_square_"] == 5
    # A to M, the second rung; the rest is numbers per block and diagonals.
    assert round(counts.elements["solver"] / A.numel(), 1) == 2.1
    assert not counts.waits
    assert solution.is_symmetric
    assert solution.scale is None
    assert (solution.X - torch.eye(64)).abs().max() < 0.43


@pytest.mark.skipif(find_spec("triton") is None, reason="the fused square needs triton")
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("divisor", [1.0, 0.05])
def test_a_fused_root_is_that_of_quotients(divisor, epsilon):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 48, 48, generator=generator) / 48**0.5
    A = factors @ factors.mT + 0.01 * torch.eye(48)
    A[1] *= 1e20
    A[2] *= 1e-20
    A[3] = 0.0
    A[4, 5, 5] = torch.nan
    config = ds.MinimaxConfig(relative_epsilon=1e-3, matmul_precision="fp16x3")
    exact = ds.MinimaxConfig(relative_epsilon=1e-3)
    # In float64 the bound would be another one, and so the place on the polynomial.
    truth = minimax(A / divisor, Fraction(4), exact, epsilon)
    expected = truth.X * truth.scale[:, None, None]
    with DeviceCounts({}, default="solver") as device:
        device.place([A])
        solution = minimax(A, Fraction(4), config, epsilon, divisor)
        assert device.counts.operations["solver", "symmetric_square_"] > 5
    error = (solution.X - expected)[:4].flatten(1).norm(dim=1) / expected[:4].flatten(1).norm(dim=1)
    assert error.max() < 1e-4
    assert torch.allclose(solution.damping[:4], truth.damping[:4], rtol=1e-4)
    assert solution.X[4].isnan().any()
    unfused = minimax(A, Fraction(4), exact, epsilon, divisor)
    error = (unfused.X * unfused.scale[:, None, None] - expected)[:4].flatten(1).norm(dim=1)
    assert (error / expected[:4].flatten(1).norm(dim=1)).max() < 1e-4
