"""Scalar preconditioners, and factor matrices that are divided by the other dimensions."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch

import dash_shampoo as ds
from tests.preconditioners.list_table import OURS, build, flat, gradients, parameters

SHAPES = ((9, 6), (8, 8), (5,), ())
SCALARS = {
    "AdaGrad": ds.ScalarAdaGradPreconditionerConfig(epsilon=0.1),
    "RMSprop": ds.ScalarRMSpropPreconditionerConfig(epsilon=0.1, beta2=0.9),
    "Adam": ds.ScalarAdamPreconditionerConfig(epsilon=0.1, beta2=0.9),
}
each_scalar = pytest.mark.parametrize("name", SCALARS)


def second_moment(name: str, mean_squares: list[float]) -> float:
    """v of a block, of the mean squares of its gradients so far."""
    if name == "AdaGrad":
        return sum(mean_squares)
    v = 0.0
    for square in mean_squares:
        v = 0.9 * v + 0.1 * square
    return v / (1 - 0.9 ** len(mean_squares)) if name == "Adam" else v


def train(shapes: tuple, steps: int, **options: object) -> tuple[list, ds.DashShampoo]:
    params = parameters(shapes, torch.float64)
    options = {"lr": 1.0, "betas": (0.0, 0.95), "max_preconditioner_dim": math.inf, **options}
    optimizer = ds.DashShampoo(params, **options)
    for grads in gradients(shapes, torch.float64, steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, optimizer


@each_scalar
def test_the_update_is_the_gradient_by_its_root_mean_square(name: str) -> None:
    params, optimizer = train(SHAPES, 4, preconditioner_config=SCALARS[name])
    expected = [param.detach().clone() for param in parameters(SHAPES, torch.float64)]
    seen: list[list[float]] = [[] for _ in SHAPES]
    for grads in gradients(SHAPES, torch.float64, 4):
        for param, grad, squares in zip(expected, grads, seen, strict=True):
            squares.append(float(grad.square().mean()))
            param.sub_(grad / (math.sqrt(second_moment(name, squares)) + 0.1))
    for param, other in zip(params, expected, strict=True):
        # The base takes bias corrections in fp32: 1e-7 of an update of length 1, four times.
        torch.testing.assert_close(param.detach(), other, rtol=1e-6, atol=1e-6)
    state = flat(optimizer.state_dict()["state"])
    numbers = [tensor for path, tensor in state.items() if "adagrad" in path]
    assert [tuple(number.shape) for number in numbers] == [()] * len(SHAPES)


@each_scalar
def test_as_grafting_it_gives_each_block_its_length(name: str) -> None:
    params, _ = train(
        SHAPES[:2],
        1,
        grafting_config=SCALARS[name],
        preconditioner_config=ds.RootInvShampooPreconditionerConfig(),
    )
    before = parameters(SHAPES[:2], torch.float64)
    for param, old, grad in zip(
        params, before, next(gradients(SHAPES[:2], torch.float64, 1)), strict=True
    ):
        v = second_moment(name, [float(grad.square().mean())])
        length = float(grad.norm()) / (math.sqrt(v) + 0.1)
        assert float((param - old).detach().norm()) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("name", SCALARS)
def test_bf16_blocks_have_a_number_in_fp32(name: str) -> None:
    params = parameters(SHAPES, torch.bfloat16)
    optimizer = ds.DashShampoo(params, preconditioner_config=SCALARS[name])
    state = flat(optimizer.state_dict()["state"])
    assert {t.dtype for path, t in state.items() if "adagrad" in path} == {torch.float32}


@each_scalar
def test_the_base_s_own_class_does_not_take_it_for_adam(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(NotImplementedError):
        ds.DistributedShampoo([param], preconditioner_config=SCALARS[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ds.ScalarAdamPreconditionerConfig(beta2=0.0), "beta2=0.0"),
        (lambda: ds.ScalarAdaGradPreconditionerConfig(epsilon=0.0), "epsilon=0.0"),
        (
            lambda: ds.DashKLShampooPreconditionerConfig(max_workspace_bytes=0),
            "max_workspace_bytes=0",
        ),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


NORMALIZED = [
    "DashShampooPreconditionerConfig",
    "DashEigendecomposedShampooPreconditionerConfig",
    "DashSOAPPreconditionerConfig",
]


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("packed", [False, True])
def test_outer_products_are_divided_by_the_other_dimensions(name: str, packed: bool) -> None:
    shapes = ((9, 6), (3, 4, 5), (7,))
    factors = []
    for normalized in (False, True):
        config = getattr(ds, name)(
            use_dimension_normalization=normalized,
            use_symmetric_packing=packed,
            factor_matrix_dtype=torch.float64,
        )
        options = {
            "distributed_config": ds.SingleDeviceDistributedConfig(
                target_parameter_dimensionality=math.inf
            )
        }
        _, optimizer = train(shapes, 3, preconditioner_config=config, epsilon=1e-3, **options)
        state = flat(optimizer.state_dict()["state"])
        factors.append({k: t for k, t in state.items() if "/factor_matrices/" in k})
    plain, divided = factors
    assert len(plain) == 6
    for path, factor in plain.items():
        shape = shapes[int(path.split("/")[1])]
        dimension = int(path.split("/")[-1].split(".")[-1])
        rest = math.prod(shape) / shape[dimension]
        torch.testing.assert_close(divided[path] * rest, factor, rtol=1e-12, atol=1e-12)


def test_without_grafting_updates_are_about_as_long_as_adam_s() -> None:
    """Of gradients without structure, of any shape; the plain update is (m·n)^(1/4) times shorter."""
    shapes = ((16, 64), (64, 16), (32, 32))
    config = ds.DashShampooPreconditionerConfig(use_dimension_normalization=True)
    params = parameters(shapes, torch.float64)
    optimizer = ds.DashShampoo(
        params, lr=1.0, betas=(0.0, 0.999), epsilon=1e-9, max_preconditioner_dim=64,
        preconditioner_config=config,
        start_preconditioning_step=100, precondition_frequency=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = 7.0 * torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert float((param - old).detach().square().mean().sqrt()) == pytest.approx(1.0, rel=0.1)


def test_what_it_is_saved_with_can_be_read_safely() -> None:
    for row in OURS:
        params = parameters(((8, 8),), torch.float32)
        optimizer = build(row, params, torch.float32)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        build(row, params, torch.float32).load_state_dict(torch.load(file, weights_only=True))
