"""Precision of the products, and how many of them each solver needs."""

from __future__ import annotations

import math

import pytest
import torch

from dash_shampoo.base import CoupledHigherOrderConfig, CoupledNewtonConfig, EigenConfig
from dash_shampoo.inverse_root import (
    ChebyshevConfig,
    MinimaxConfig,
    NewtonDBConfig,
    NewtonSchulzRootInvConfig,
    PowerIterationScaling,
    ScaledCoupledNewtonConfig,
    inverse_root,
)
from dash_shampoo.inverse_root.blocks import affine
from dash_shampoo.preconditioners.modes import contract
from dash_shampoo.products import (
    Products,
    count_products,
    exact_products,
    is_tf32_allowed,
    multiple_of_identity,
    precision,
)
from dash_shampoo.products.precision import round_to_tf32, tf32_switch
from dash_shampoo.products.triangle import can_use_triangle, triangular_square_
from tests.reference.inverse_root import random_spd

SIZE = 16


def _spd(num_blocks: int = 3, condition: float = 30.0) -> torch.Tensor:
    return random_spd(num_blocks, SIZE, condition, torch.Generator().manual_seed(0)).float()


def _newton(max_iterations: int) -> CoupledNewtonConfig:
    return CoupledNewtonConfig(max_iterations=max_iterations, tolerance=0.0)


def _higher_order(order: int, max_iterations: int) -> CoupledHigherOrderConfig:
    return CoupledHigherOrderConfig(
        rel_epsilon=0.0, abs_epsilon=0.0, order=order, max_iterations=max_iterations, tolerance=0.0
    )


# config, root, matmuls, those symmetric by structure, why
COUNTS = [
    (EigenConfig(), 4, 1, 0, "Vᵀ(fV)"),
    (_newton(10), 2, 29, 10, "3 a step, the first X free; C² symmetric"),
    (_newton(10), 4, 39, 20, "4 a step, the first X free; C² and C⁴ symmetric"),
    (_newton(10), 8, 49, 30, "5 a step, the first X free"),
    (_newton(1), 2, 2, 1, "only M"),
    (_newton(0), 2, 0, 0, "nothing to do"),
    (NewtonDBConfig(), 2, 27, 0, "1 + 8·3 + 2: the last step needs only Z"),
    (NewtonDBConfig(), 4, 54, 0, "two passes"),
    (NewtonDBConfig(), 8, 81, 0, "three passes"),
    (NewtonSchulzRootInvConfig(), 2, 33, 9, "2 + 7·4 + 3; W² symmetric"),
    (NewtonSchulzRootInvConfig(), 4, 33 + 21, 15, "the second pass has 6 steps"),
    (NewtonSchulzRootInvConfig(), 8, 33 + 21 + 17, 20, "the third pass has 5 steps"),
    (NewtonSchulzRootInvConfig(relative_epsilon=0.0), 4, 2 * 33, 18, "no damping, no bound"),
    (MinimaxConfig(relative_epsilon=1e-4), 2, 9, 9, "squares alone"),
    (MinimaxConfig(num_squarings=4), 2, 4, 4, "as asked for"),
    (NewtonDBConfig(num_iterations=1), 2, 0, 0, "E alone"),
    (NewtonDBConfig(num_iterations=2), 2, 3, 0, "1 + 2"),
    (ChebyshevConfig(degree=20), 4, 7, 2, "4 baby steps: T_2, T_4 are squares"),
    (ChebyshevConfig(degree=40), 4, 11, 2, "5 baby steps"),
    (ChebyshevConfig(degree=60), 4, 14, 3, "6 baby steps"),
    (ChebyshevConfig(degree=100), 4, 18, 5, "10 baby steps"),
    (ChebyshevConfig(degree=200), 4, 27, 6, "13 baby steps"),
    *(
        (ChebyshevConfig(degree=degree, evaluation="clenshaw"), 4, degree - 1, 0, "degree - 1")
        for degree in (20, 40, 60, 100, 200)
    ),
    (ChebyshevConfig(degree=1), 4, 0, 0, "an affine function"),
    (_higher_order(3, 3), 2, 2 + 2 * 4 + 2, 1 + 2 + 1, "Newton step, 2 steps, error check"),
    (_higher_order(2, 3), 4, 3 + 2 * 4 + 3, 2 + 4 + 2, "Newton step, 2 steps, error check"),
    (
        NewtonDBConfig(scaling=PowerIterationScaling(num_vectors=4)),
        2,
        27 + 11 * 4 / SIZE,
        0,
        "eleven products with 4 of 16 columns",
    ),
    (
        ScaledCoupledNewtonConfig(max_iterations=10, tolerance=0.0),
        4,
        39,
        20,
        "as the base's; Frobenius costs none",
    ),
]


@pytest.mark.parametrize(
    ("config", "root", "total", "symmetric", "why"), COUNTS, ids=lambda x: str(x)[:60]
)
def test_matmul_counts(config, root: int, total: float, symmetric: float, why: str) -> None:
    A = _spd()
    with count_products(num_blocks=len(A), size=SIZE) as count:
        inverse_root(A, root, config)
    assert math.isclose(count.num_products + count.num_columns / SIZE, total), why
    assert count.num_symmetric == symmetric, why


def test_blocks_that_are_done_stop_costing_matmuls() -> None:
    A = torch.cat((torch.eye(SIZE).expand(9, SIZE, SIZE), _spd(1, condition=1e3)))
    with count_products(num_blocks=10, size=SIZE) as together:
        result = inverse_root(A, 2, CoupledNewtonConfig())
    with count_products(num_blocks=1, size=SIZE) as alone:
        single = inverse_root(A[-1:], 2, CoupledNewtonConfig())
    assert result.iterations[-1] > result.iterations[0]
    assert together.num_products < alone.num_products
    assert torch.equal(result.value[-1:], single.value)


def test_counting() -> None:
    A, B = torch.randn(4, 16, 16), torch.randn(4, 16, 16)
    with count_products(num_blocks=4, size=16) as count:
        A @ B
        assert (count.num_products, count.num_symmetric) == (1.0, 0.0)
        A[:2] @ A[:2]
        assert (count.num_products, count.num_symmetric) == (1.5, 0.5)
        A @ B[:, :, :3]
        B[:, :3] @ A
        assert (count.num_products, count.num_columns) == (1.5, 6.0)
        torch.ones(4, 3, 5) @ torch.ones(4, 5, 3)
        torch.linalg.eigh(A[0])
        assert (count.num_products, count.num_eigendecompositions) == (1.5, 0.25)
    A @ B
    assert count.num_products == 1.5, "only inside"


@pytest.mark.parametrize("exponent", [1, 2, 3, 4, 5, 7, 8, 10])
def test_power(exponent: int) -> None:
    A = _spd().double()
    with count_products(num_blocks=3, size=SIZE) as count:
        power = Products("fp32").power(A, exponent)
    torch.testing.assert_close(power, torch.linalg.matrix_power(A, exponent))
    assert count.num_products == math.floor(math.log2(exponent)) + exponent.bit_count() - 1
    with pytest.raises(ValueError, match="exponent=0"):
        Products("fp32").power(A, 0)


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 11), ("fp16", 11), ("bf16", 8)])
def test_operands_are_rounded_and_sums_are_not(precision, bits: int) -> None:
    """Unit round-off u = 2^-bits of each operand; the sums of N such products stay in float32."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.rand(2, 64, 64, generator=generator) + 1.0 for _ in range(2))
    product = Products(precision)(A, B)
    assert product.dtype == torch.float32
    exact = A.double() @ B.double()
    error = ((product.double() - exact) / exact).abs().max()
    u = 2.0**-bits
    # Errors of the operands average out over 64 terms; rounding the sum itself would show as u.
    assert 0.02 * u < error < u
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if precision in dtypes:
        rounded = [X.to(dtypes[precision]).float() for X in (A, B)]
        assert torch.equal(product, torch.bmm(*rounded))


def test_fp32_means_the_dtype_of_the_operands() -> None:
    A = _spd().double()
    assert torch.equal(Products("fp32")(A, A), torch.bmm(A, A))


def test_rounding_to_tf32() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-12, 65504.0])
    expected = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -1.0, 65504.0])
    assert torch.equal(round_to_tf32(x), expected)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e-20
    rounded = round_to_tf32(values)
    assert float(((rounded - values) / values).abs().max()) <= 2.0**-11
    assert torch.equal(round_to_tf32(rounded), rounded)
    assert round_to_tf32(torch.tensor([math.nan])).isnan().all()
    assert torch.equal(round_to_tf32(torch.tensor([math.inf])), torch.tensor([math.inf]))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_writing_to_out_and_rounding_before_change_nothing(precision) -> None:
    A, B = _spd(), _spd(3, 5.0)
    products = Products(precision)
    expected = products(A, B)
    out = torch.empty_like(A)
    assert products(A, B, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(products(products.round(A), products.round(B)), expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_square_with_all_it_can_do(precision, dtype: torch.dtype) -> None:
    A, M = _spd().to(dtype), _spd(3, 5.0).to(dtype)
    tolerance = {"fp32": 1e-6, "fp16x3": 1e-5, "tf32": 3e-3, "fp16": 3e-3, "bf16": 3e-2}[precision]
    expected = -1.5 * A @ A + 0.25 * M + 3.0 * torch.eye(SIZE, dtype=dtype)
    products = Products(precision)
    out = torch.full_like(A, torch.nan)
    found = products.square(A, alpha=-1.5, addend=M, beta=0.25, shift=3.0, out=out)
    assert found is out
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)
    in_place = M.clone()
    products.square(A, alpha=-1.5, addend=in_place, beta=0.25, shift=3.0, out=in_place)
    assert torch.equal(in_place, found)
    torch.testing.assert_close(products.square(A), A @ A, rtol=0.0, atol=tolerance)
    scaled_sum = products.add_to_(M.clone(), A, A, alpha=2.0)
    torch.testing.assert_close(scaled_sum, M + 2.0 * A @ A, rtol=0.0, atol=2 * tolerance)


@pytest.mark.parametrize("size", [257, 512, 600, 1000])
@pytest.mark.parametrize("with_addend", [False, True])
def test_a_square_by_one_triangle_is_the_square(size: int, with_addend: bool) -> None:
    S = random_spd(2, size, 10.0, torch.Generator().manual_seed(0)).float()
    M = S.mT.contiguous() * 0.5 if with_addend else None
    out = torch.full_like(S, torch.nan)
    triangular_square_(out, S, 2.0, M, -0.5)
    expected = 2.0 * S.double() @ S.double() - (0.5 * M.double() if M is not None else 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=0.0, atol=1e-5)
    if M is not None:
        triangular_square_(M, S, 2.0, M, -0.5)
        assert torch.equal(M, out)
    assert can_use_triangle(S) == (size >= 512)


@pytest.mark.parametrize("setting", ["medium", "high"])
def test_the_program_s_precision_of_products_has_no_say(setting: str) -> None:
    """oneDNN takes fp32 products on the CPU down to bf16 or TF32 where there are units for it."""
    A = random_spd(2, 256, 1e3, torch.Generator().manual_seed(0)).float()
    configs = [MinimaxConfig(), CoupledNewtonConfig(), NewtonDBConfig(), EigenConfig()]
    expected = [inverse_root(A, 4, c, 1e-6, residual_threshold=0.3) for c in configs]
    try:
        torch.set_float32_matmul_precision(setting)
        before = torch.backends.mkldnn.matmul.fp32_precision
        found = [inverse_root(A, 4, c, 1e-6, residual_threshold=0.3) for c in configs]
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.value, other.value)
        assert torch.equal(one.residual.nan_to_num(7.0), other.residual.nan_to_num(7.0))


@pytest.mark.parametrize("setting", ["highest", "medium", "high"])
@pytest.mark.parametrize("size", [0, 2**20])
def test_products_on_the_cpu_are_exact_by_either_library(setting: str, size: int) -> None:
    A = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected = A.double() @ A.double()
    matmul = torch.backends.mkldnn.matmul
    try:
        torch.set_float32_matmul_precision(setting)
        before = matmul.fp32_precision
        with exact_products(A.device, size):
            error = (A @ A - expected).norm() / expected.norm()
            within = matmul.fp32_precision
        assert error < 1e-6
        assert matmul.fp32_precision == before
        assert torch.get_float32_matmul_precision() == setting
        is_fast = size > 0 and precision._FASTEST_EXACT == "bf16"
        assert within in (("bf16",) if is_fast else ("ieee", "none"))
        with exact_products(torch.device("cuda"), size):
            assert matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("vendor", "capability", "error", "setting"),
    [
        ("AuthenticAMD", "AVX512", 1e-7, "bf16"),
        ("AuthenticAMD", "AVX512", 2e-3, "ieee"),  # operands are rounded to bf16
        ("AuthenticAMD", "AVX512", math.nan, "ieee"),
        ("AuthenticAMD", "AVX2", 1e-7, "ieee"),
        ("GenuineIntel", "AVX512", 1e-7, "ieee"),
    ],
)
def test_onednn_multiplies_where_it_is_faster_and_exact(
    monkeypatch, vendor: str, capability: str, error: float, setting: str
) -> None:
    monkeypatch.setattr(precision, "_is_from_amd", lambda: vendor == "AuthenticAMD")
    monkeypatch.setattr(precision, "_product_error", lambda size: error)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert precision._fastest_exact_setting() == setting
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (15, 15), (16, 16), (33, 20), (64, 1)])
@pytest.mark.parametrize("setting", ["ieee", "bf16"])
def test_no_block_s_products_depend_on_how_many_blocks_there_are(
    monkeypatch, shape: tuple[int, int], setting: str
) -> None:
    monkeypatch.setattr(precision, "_FASTEST_EXACT", setting)
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(9, *shape, generator=generator)
    L, R = (torch.randn(9, n, n, generator=generator) for n in shape)
    together = contract(G, {0: L, 1: R}, torch.float32)
    F = torch.randn(9, shape[0], shape[0], generator=generator)

    def update(rows: slice) -> torch.Tensor:
        with exact_products(F.device, shape[0] ** 2 * shape[1]):
            return torch.baddbmm(F[rows], G[rows], G[rows].mT, beta=0.9, alpha=0.1)

    all_factors = update(slice(0, 9))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 9)):
        alone = contract(G[rows].clone(), {0: L[rows], 1: R[rows]}, torch.float32)
        assert torch.equal(alone, together[rows])
        if shape[1] > 1:  # MKL's sums with an addend depend on it for a column
            assert torch.equal(update(rows), all_factors[rows])


@pytest.mark.parametrize("is_allowed", [False, True])
@pytest.mark.parametrize(
    "program", ["untouched", "legacy_true", "legacy_medium", "new_tf32", "new_ieee"]
)
def test_the_tf32_switch_is_put_back(program: str, is_allowed: bool) -> None:
    """torch has one process-wide switch with an older and a newer interface; both come back as found."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has only the older setting")
    try:
        if program == "legacy_true":
            matmul.allow_tf32 = True
        elif program == "legacy_medium":
            torch.set_float32_matmul_precision("medium")
        elif program.startswith("new"):
            matmul.fp32_precision = program.removeprefix("new_")
        before = matmul.fp32_precision
        precision = None if program == "new_tf32" else torch.get_float32_matmul_precision()
        with tf32_switch(is_allowed):
            assert is_tf32_allowed() == is_allowed
        assert matmul.fp32_precision == before
        if precision is not None:
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    "config",
    [
        NewtonDBConfig(matmul_precision="fp16"),
        NewtonDBConfig(matmul_precision="bf16"),
        ScaledCoupledNewtonConfig(matmul_precision="fp16", max_iterations=10),
        ChebyshevConfig(degree=20, matmul_precision="bf16"),
        ChebyshevConfig(degree=20, matmul_precision="fp16", evaluation="clenshaw"),
        NewtonDBConfig(scaling=PowerIterationScaling(num_vectors=4, matmul_precision="bf16")),
    ],
    ids=lambda config: str(config)[:70],
)
def test_half_operands_as_on_cuda_give_what_the_emulation_gives(monkeypatch, config) -> None:
    """CUDA multiplies half operands into float32; here a stand-in for that product does, on the CPU."""
    A = _spd()
    expected = inverse_root(A, 4, config)
    bmm, operand_dtypes = torch.bmm, set()

    def cuda_bmm(A: torch.Tensor, B: torch.Tensor, out_dtype=None, *, out=None) -> torch.Tensor:
        assert A.dtype == B.dtype
        operand_dtypes.add(A.dtype)
        assert (out_dtype == torch.float32) == (A.dtype in (torch.float16, torch.bfloat16))
        product = bmm(A.float(), B.float())
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "bmm", cuda_bmm)
    monkeypatch.setattr(precision, "can_use_half_operands", lambda A: A.dtype == torch.float32)
    result = inverse_root(A, 4, config)
    assert torch.equal(result.value, expected.value)
    assert operand_dtypes & {torch.float16, torch.bfloat16}


def test_passes_beside_products_are_counted_by_matrices():
    A = torch.ones(4, 8, 8)
    with count_products(num_blocks=4, size=8) as count:
        (A @ A).mul_(2.0).add_(A[:1])
        torch.linalg.vector_norm(A.flatten(1), dim=1).sqrt_()
        A.mT, torch.empty_like(A), A.diagonal(dim1=1, dim2=2).add_(1.0)
    assert count.num_passes == 3.0


def test_only_small_identities_are_kept():
    """They lie outside of every workspace; of larger blocks a pass over the diagonals takes their place."""
    for size in (64, 256, 257, 512):
        A = torch.randn(2, size, size)
        before = multiple_of_identity.cache_info().misses
        result = affine(A, -0.5, 1.25)
        kept = multiple_of_identity.cache_info().misses - before
        assert kept <= (size <= 256)
        torch.testing.assert_close(result, 1.25 * torch.eye(size) - 0.5 * A)
        out = A.clone()
        assert affine(out, -0.5, 1.25, out=out) is out
        assert torch.equal(out, result)
