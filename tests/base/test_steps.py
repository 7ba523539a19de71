"""What a step does and leaves alone: gradients, memory formats, missing gradients, modes, compilation."""

from __future__ import annotations

import pytest
import torch

import dash_shampoo.base.embedded as embedded
from tests.base.cases import gradients, parameters, relative_error, take_steps

SGD = embedded.SGDPreconditionerConfig()


@pytest.mark.parametrize("preconditioner", [SGD, embedded.DefaultShampooConfig])
@pytest.mark.parametrize("grafting", [None, SGD, embedded.AdamPreconditionerConfig()])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_gradients_stay_as_they_are(preconditioner, grafting, beta1):
    params = parameters()
    optimizer = embedded.DistributedShampoo(
        params,
        betas=(beta1, 0.9),
        use_bias_correction=False,
        weight_decay=0.1,
        weight_decay_type=embedded.WeightDecayType.L2,
        precondition_frequency=2,
        grafting_config=grafting,
        preconditioner_config=preconditioner,
    )
    for grads in gradients(3):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


def test_the_ema_of_the_gradients_is_not_the_search_direction():
    """Without preconditioning and bias correction both have the same values, not the same memory."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = embedded.DistributedShampoo(
        [param], lr=1.0, betas=(0.5, 1.0), use_bias_correction=False, preconditioner_config=SGD
    )
    for _ in range(2):
        param.grad = torch.ones(3, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(
        optimizer.state[param]["block_0"]["filtered_grad"],
        torch.full((3,), 0.75, dtype=torch.float64),
    )
    torch.testing.assert_close(param.detach(), torch.full((3,), -1.25, dtype=torch.float64))


def with_layout(layout, shape):
    """A parameter of random numbers whose memory is laid out as named."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if layout == "channels last":
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        values = values.mT.contiguous().mT
    elif layout == "strided":
        values = torch.stack([values, values], dim=-1)[..., 0]
    return torch.nn.Parameter(values)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided"])
@pytest.mark.parametrize("gradient_layout", ["as the parameter's", "contiguous"])
@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (12, 5, 3, 3)])
def test_memory_formats_change_nothing(layout, gradient_layout, shape):
    param, expected = with_layout(layout, shape), with_layout("contiguous", shape)
    options = {
        "max_preconditioner_dim": 8,
        "iterate_averaging_config": embedded.GeneralizedPrimalAveragingConfig(),
    }
    optimizer = embedded.DistributedShampoo([param], **options)
    reference = embedded.DistributedShampoo([expected], **options)
    strides = param.stride()
    for (grad,) in gradients(3, shapes=[shape]):
        param.grad = (
            grad if gradient_layout == "contiguous" else torch.empty_like(param).copy_(grad)
        )
        expected.grad = grad
        optimizer.step()
        reference.step()
        assert relative_error(param, expected) <= 1e-12
    optimizer.eval()
    reference.eval()
    assert relative_error(param, expected) <= 1e-12
    assert param.stride() == strides


def test_a_parameter_changed_from_outside_is_seen():
    param = with_layout("channels last", (6, 3, 2, 2))
    optimizer = embedded.DistributedShampoo([param], lr=0.0)
    with torch.no_grad():
        param.fill_(3.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (param == 3.0).all()


def test_parameters_without_gradient_or_elements_are_left_alone():
    params = parameters(shapes=[(3, 4), (0,), (0, 5), (2, 2)])
    before = [p.detach().clone() for p in params]
    optimizer = embedded.DistributedShampoo(params, weight_decay=0.1)
    params[1].grad = torch.zeros(0, dtype=torch.float64)
    params[3].grad = torch.ones(2, 2, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[3], before[3])
    for param in params:
        param.grad = None
    after = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, after, strict=True))
    assert optimizer.state[params[0]]["step"] == 2


def test_a_missing_gradient_leaves_the_state_of_the_block():
    params = parameters(shapes=[(3, 4), (5,)])
    optimizer = embedded.DistributedShampoo(
        params, grafting_config=embedded.AdamPreconditionerConfig()
    )
    steps = gradients(2, shapes=[(3, 4), (5,)])
    take_steps(optimizer, params, steps[:1])
    state = optimizer.state[params[1]]["block_0"]
    before = state["filtered_grad"].clone(), state["shampoo"]["factor_matrices"][0].clone()
    take_steps(optimizer, params, [[steps[1][0], None]])
    assert torch.equal(state["filtered_grad"], before[0])
    assert torch.equal(state["shampoo"]["factor_matrices"][0], before[1])


def test_the_closure_is_evaluated_with_gradients():
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = embedded.DistributedShampoo([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 25.0
    assert param.square().sum() < 25.0
    assert optimizer.step() is None


def test_a_learning_rate_may_be_a_tensor_or_scheduled():
    options = {"max_preconditioner_dim": 8}
    results = []
    for kind in ("numbers", "tensor", "scheduler"):
        params = parameters()
        optimizer = embedded.DistributedShampoo(params, lr=0.1, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step, grads in enumerate(gradients(3)):
            if kind != "scheduler":
                value = 0.1 * 0.5**step
                optimizer.param_groups[0]["lr"] = torch.tensor(value) if kind == "tensor" else value
            take_steps(optimizer, params, [grads])
            scheduler.step()
        results.append(params)
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))


def test_schedule_free_starts_at_learning_rate_zero():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = embedded.DistributedShampoo(
        params, lr=0.1, iterate_averaging_config=embedded.ScheduleFreeConfig()
    )
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, params, gradients(1))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.1
    take_steps(optimizer, params, gradients(1))
    assert all(
        torch.isfinite(p).all() and (p != q).all() for p, q in zip(params, before, strict=True)
    )


def test_averaging_has_two_modes():
    params = parameters()
    optimizer = embedded.DistributedShampoo(
        params, iterate_averaging_config=embedded.GeneralizedPrimalAveragingConfig()
    )
    take_steps(optimizer, params, gradients(2))
    training = [p.detach().clone() for p in params]
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(params, training, strict=True))
    optimizer.eval()
    evaluation = [p.detach().clone() for p in params]
    assert not any(torch.equal(p, q) for p, q in zip(params, training, strict=True))
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(params, evaluation, strict=True))
    with pytest.raises(RuntimeError, match=r"call its train\(\) before step\(\)"):
        take_steps(optimizer, params, gradients(1))
    optimizer.train()
    for p, q in zip(params, training, strict=True):
        torch.testing.assert_close(p.detach(), q)


def test_modes_do_nothing_without_averaging():
    params = parameters()
    optimizer = embedded.DistributedShampoo(
        params, iterate_averaging_config=embedded.ClassicMomentumConfig()
    )
    before = [p.detach().clone() for p in params]
    optimizer.eval()
    take_steps(optimizer, params, gradients(1))
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_the_adam_route_is_adam():
    """AdaGrad-family preconditioners alone are the optimizers of these names."""
    params, expected = parameters(), parameters()
    optimizer = embedded.DistributedShampoo(
        params,
        lr=0.25,
        betas=(0.5, 0.75),
        weight_decay=0.5,
        preconditioner_config=embedded.AdamPreconditionerConfig(beta2=0.75, epsilon=1e-8),
    )
    adam = torch.optim.AdamW(expected, lr=0.25, betas=(0.5, 0.75), weight_decay=0.5)
    steps = gradients(4)
    take_steps(optimizer, params, steps)
    take_steps(adam, expected, steps)
    # AdamW decays before the step, we after: the same to first order only where lr·decay is small, so the
    # decay is undone for the comparison.
    decayed, plain = parameters(), parameters()
    optimizer = embedded.DistributedShampoo(
        decayed,
        lr=0.25,
        betas=(0.5, 0.75),
        preconditioner_config=embedded.AdamPreconditionerConfig(beta2=0.75, epsilon=1e-8),
    )
    adam = torch.optim.Adam(plain, lr=0.25, betas=(0.5, 0.75))
    take_steps(optimizer, decayed, steps)
    take_steps(adam, plain, steps)
    for p, q in zip(decayed, plain, strict=True):
        assert relative_error(p, q) <= 1e-10


def test_a_compiled_step_gives_the_same():
    # The backend aot_eager traces and functionalises, and needs no C++ compiler.
    compiled = embedded.ShampooPT2CompileConfig(backend="aot_eager")
    results = []
    for compile_config in (None, compiled):
        params = parameters(shapes=[(7,), (9, 3)])
        optimizer = embedded.DistributedShampoo(
            params,
            lr=0.1,
            betas=(0.9, 0.9),
            max_preconditioner_dim=8,
            precondition_frequency=2,
            weight_decay=0.1,
            weight_decay_type=embedded.WeightDecayType.CORRECTED,
            grafting_config=embedded.AdamPreconditionerConfig(),
            iterate_averaging_config=embedded.ScheduleFreeConfig(),
            shampoo_pt2_compile_config=compile_config,
        )
        steps = gradients(5, shapes=[(7,), (9, 3)])
        steps[3][0] = steps[4][0] = None
        take_steps(optimizer, params, steps)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert relative_error(p, q) <= 1e-12
