"""Precision of the products, and how many of them each solver needs."""

from __future__ import annotations

import math

import pytest
import torch

from dash_shampoo.base import CoupledHigherOrderConfig, CoupledNewtonConfig, EigenConfig
from dash_shampoo.config import (
    ChebyshevConfig,
    NewtonDBConfig,
    PowerIterationScaling,
    ScaledCoupledNewtonConfig,
)
from dash_shampoo.inverse_root import inverse_root
from dash_shampoo.inverse_root import matmul as matmul_module
from dash_shampoo.inverse_root.matmul import (
    Matmul,
    MatmulCounter,
    _tf32_switch,
    is_tf32_allowed,
    round_to_tf32,
)
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
    (EigenConfig(), 4, 1, 1, "Vᵀ(fV)"),
    (_newton(10), 2, 29, 10, "3 a step, the first X free; C² symmetric"),
    (_newton(10), 4, 39, 20, "4 a step, the first X free; C² and C⁴ symmetric"),
    (_newton(10), 8, 49, 30, "5 a step, the first X free"),
    (_newton(1), 2, 2, 1, "only M"),
    (_newton(0), 2, 0, 0, "nothing to do"),
    (NewtonDBConfig(), 2, 27, 0, "1 + 8·3 + 2: the last step needs only Z"),
    (NewtonDBConfig(), 4, 54, 0, "two passes"),
    (NewtonDBConfig(), 8, 81, 0, "three passes"),
    (NewtonDBConfig(use_fused_matmul=True), 4, 54, 0, "a product of 2B counts as two"),
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
    result = inverse_root(_spd(), root, config)
    assert math.isclose(result.num_matmuls, total), why
    assert result.num_symmetric_matmuls == symmetric, why


def test_blocks_that_are_done_stop_costing_matmuls() -> None:
    A = torch.cat((torch.eye(SIZE).expand(9, SIZE, SIZE), _spd(1, condition=1e3)))
    result = inverse_root(A, 2, CoupledNewtonConfig())
    alone = inverse_root(A[-1:], 2, CoupledNewtonConfig())
    assert result.iterations[-1] > result.iterations[0]
    assert result.num_matmuls < alone.num_matmuls
    assert torch.equal(result.value[-1:], alone.value)


def test_counting() -> None:
    counter = MatmulCounter(num_blocks=4)
    matmul = Matmul("fp32", counter)
    A = torch.randn(4, 6, 6)
    matmul(A, A)
    assert (counter.total, counter.symmetric) == (1.0, 0.0)
    matmul(A[:2], A[:2], is_symmetric=True)
    assert (counter.total, counter.symmetric) == (1.5, 0.5)
    matmul(A, A[:, :, :3])
    assert (counter.total, counter.symmetric) == (2.0, 0.5)
    matmul.power(A, 5)
    assert (counter.total, counter.symmetric) == (5.0, 3.5)


@pytest.mark.parametrize("exponent", [1, 2, 3, 4, 5, 7, 8, 10])
def test_power(exponent: int) -> None:
    A = _spd().double()
    counter = MatmulCounter(num_blocks=3)
    power = Matmul("fp32", counter).power(A, exponent)
    torch.testing.assert_close(power, torch.linalg.matrix_power(A, exponent))
    assert counter.total == math.floor(math.log2(exponent)) + exponent.bit_count() - 1
    with pytest.raises(ValueError, match="exponent=0"):
        Matmul("fp32", counter).power(A, 0)


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 11), ("fp16", 11), ("bf16", 8)])
def test_operands_are_rounded_and_sums_are_not(precision, bits: int) -> None:
    """Unit round-off u = 2^-bits of each operand; the sums of N such products stay in float32."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.rand(2, 64, 64, generator=generator) + 1.0 for _ in range(2))
    product = Matmul(precision, MatmulCounter(2))(A, B)
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
    assert torch.equal(Matmul("fp32", MatmulCounter(3))(A, A), torch.bmm(A, A))


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
    matmul = Matmul(precision, MatmulCounter(3))
    expected = matmul(A, B)
    out = torch.empty_like(A)
    assert matmul(A, B, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(matmul(matmul.round(A), matmul.round(B)), expected)


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
        with _tf32_switch(is_allowed):
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
        NewtonDBConfig(matmul_precision="bf16", use_fused_matmul=True),
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
    monkeypatch.setattr(matmul_module, "_can_use_half_operands", lambda A: A.dtype == torch.float32)
    result = inverse_root(A, 4, config)
    assert torch.equal(result.value, expected.value)
    assert operand_dtypes & {torch.float16, torch.bfloat16}
