"""The swap alone changes no result: DashShampoo against the base's own sequential optimizer.

Both get identical gradients, since free-running fp32 trajectories amplify a last-bit difference.
"""

from __future__ import annotations

import math

import pytest
import torch

import dash_shampoo as ds
from tests.grids import pairwise

SHAPES = [
    (),
    (1,),
    (6,),
    (7, 9),
    (8, 8),
    (8, 8),
    (8, 8),
    (20, 13),
    (3, 4, 5),
    (2, 3, 4, 5),
    (2, 1, 2, 2, 2),
]

# Relative Frobenius error of the parameters after the run. float64: a handful of roundings, amplified by
# roots of factors with condition 1e6, (1e-6)^(-1/2) at most. fp32: the same with 2^-24. bf16 parameters:
# one rounding of the update may fall to the other side, 2^-8.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}

GRID = pairwise(
    {
        # The embedded base leaves KL-Shampoo out.
        "method": ["RootInvShampoo", "RootInvKLShampoo"]
        if ds.base.name == "meta"
        else ["RootInvShampoo"],
        "grafting": [None, "SGD", "AdaGrad", "RMSprop", "Adam"],
        "weight_decay_type": list(ds.WeightDecayType),
        "beta2": [1.0, 0.999, 0.9],
        "use_bias_correction": [True, False],
        "beta3": [-1.0, 0.5],
        "beta1": [0.9, 0.0],
        "use_symmetric_packing": [True, False],
        "trace_scaling_exponent": [None, 0.5, 1.0],
        "dtype": [torch.float64, torch.float32, torch.bfloat16],
        "missing": ["never", "some", "alternating"],
        "iterate_averaging": [None, "momentum", "primal", "schedule_free"],
        "inverse_exponent_override": [{}, {2: 0.5}, {2: {0: 0.25, 1: 0.0}, 3: {1: 0.3}, 1: 0.0}],
        "drop_weighting_factor_on_gsquare": [False, True],
        "target_parameter_dimensionality": [1, 2, math.inf],
        "frequency": [(1, 1), (2, 4)],
        "solver": ["eigen", "coupled_newton", "pseudo_inverse", "higher_order"],
    }
)


def grafting(name):
    if name is None:
        return None
    config = getattr(ds, f"{name}PreconditionerConfig")
    return config() if name in ("SGD", "AdaGrad") else config(beta2=0.95)


def averaging(name):
    return {
        None: None,
        "momentum": ds.ClassicMomentumConfig(momentum=0.9, dampening=0.1, use_nesterov=True),
        "primal": ds.GeneralizedPrimalAveragingConfig(
            eval_interp_coeff=0.8, train_interp_coeff=0.7
        ),
        "schedule_free": ds.ScheduleFreeConfig(),
    }[name]


def solver(name, overrides):
    if name == "eigen":
        return ds.EigenConfig(), 1e-6
    if name == "pseudo_inverse":
        stability = ds.PseudoInverseConfig(rank_rtol=1e-4)
        return ds.EigenConfig(rank_deficient_stability_config=stability), 0.0
    if name == "coupled_newton" and 3 not in overrides:
        return ds.CoupledNewtonConfig(), 1e-3
    if name == "higher_order" and 3 not in overrides:
        return ds.CoupledHigherOrderConfig(rel_epsilon=1e-2, abs_epsilon=0.0), 1e-6
    return ds.EigenConfig(
        rank_deficient_stability_config=ds.PerturbationConfig(perturb_before_computation=False)
    ), 1e-6


def settings(case):
    config, epsilon = solver(case["solver"], case["inverse_exponent_override"])
    factor_dtype = torch.float64 if case["dtype"] is torch.float64 else torch.float32
    frequency, start = case["frequency"]
    return dict(
        lr=0.1,
        betas=(case["beta1"], case["beta2"]),
        beta3=case["beta3"],
        epsilon=epsilon,
        weight_decay=0.01,
        weight_decay_type=case["weight_decay_type"],
        max_preconditioner_dim=8,
        precondition_frequency=frequency,
        start_preconditioning_step=start,
        use_bias_correction=case["use_bias_correction"],
        iterate_averaging_config=averaging(case["iterate_averaging"]),
        grafting_config=grafting(case["grafting"]),
        distributed_config=ds.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=case["target_parameter_dimensionality"]
        ),
        preconditioner_config=getattr(ds, f"{case['method']}PreconditionerConfig")(
            amortized_computation_config=config,
            inverse_exponent_override=case["inverse_exponent_override"],
            drop_weighting_factor_on_gsquare=case["drop_weighting_factor_on_gsquare"],
            factor_matrix_dtype=factor_dtype,
            inv_factor_matrix_dtype=factor_dtype,
            use_symmetric_packing=case["use_symmetric_packing"],
            use_trace_scaling=case["trace_scaling_exponent"] is not None,
            trace_scaling_exponent=case["trace_scaling_exponent"] or 0.5,
        ),
    )


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]
    return [torch.nn.Parameter(t) for t in tensors]


def has_gradient(kind, step, index):
    return kind == "never" or (index % 3 != 1 if kind == "some" else (step + index) % 2 == 0)


def run(optimizer_class, case, steps=6):
    params = parameters(case["dtype"])
    # The second group lives on its own settings.
    # Its peak_lr is given, as Meta's class takes the constructor's lr for that.
    second = {"lr": 0.03, "peak_lr": 0.03, "weight_decay": 0.1}
    groups = [{"params": params[:6]}, {"params": params[6:], **second}]
    optimizer = optimizer_class(groups, **settings(case))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for index, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad = grad if has_gradient(case["missing"], step, index) else None
        if step == steps // 2:  # an evaluation; a no-op without iterate averaging
            optimizer.eval()
            optimizer.train()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
    return params, optimizer


def flatten(state, prefix=()):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def test_the_grid_is_not_empty():
    print(f"parity grid: {len(GRID)} cases of {len(SHAPES)} shapes")
    assert len(GRID) >= 20
    assert {case["solver"] for case in GRID} >= {"eigen", "coupled_newton", "higher_order"}
    assert {len(shape) for shape in SHAPES} >= {0, 1, 2, 3, 4}


@pytest.fixture
def base_with_our_deviations(monkeypatch):
    """The two deviations of `DashShampoo` from the base, made in the base.

    Outer products are taken in the dtype of the factor matrices: rounded to bf16 before they are summed,
    those of bf16 gradients make factor matrices indefinite.

    Meta's list returns a block without preconditioned dimensions as it is, not as a copy.

    The optimizer then scales it in place, and with it the moving average of the gradients, unless bias
    correction copies that. Here, and in `DashShampoo`, it is a copy; see
    `test_the_average_of_a_block_without_preconditioner_is_not_scaled`.
    """
    sequential = ds.base.RootInvShampooPreconditionerList
    precondition = sequential.precondition

    def copying(self, masked_grad_list):
        return tuple(t.clone() for t in precondition(self, masked_grad_list=masked_grad_list))

    update = sequential._update_factor_matrices

    def in_factor_dtype(self, masked_grad_list):
        dtype = self._preconditioner_config.factor_matrix_dtype
        update(self, masked_grad_list=tuple(grad.to(dtype) for grad in masked_grad_list))

    monkeypatch.setattr(sequential, "precondition", copying)
    monkeypatch.setattr(sequential, "_update_factor_matrices", in_factor_dtype)


@pytest.mark.usefixtures("base_with_our_deviations")
@pytest.mark.parametrize("case", GRID, ids=[f"case{i}" for i in range(len(GRID))])
def test_dash_shampoo_equals_the_base(case):
    expected, base = run(ds.DistributedShampoo, case)
    found, dash = run(ds.DashShampoo, case)
    for p, q in zip(expected, found, strict=True):
        assert torch.isfinite(p).all()
        error = torch.linalg.vector_norm((q - p).double()) / torch.linalg.vector_norm(p.double())
        assert error <= TOLERANCE[case["dtype"]], case

    ours = dict(flatten(dash.state_dict()["state"]))
    theirs = dict(flatten(base.state_dict()["state"]))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[key].shape == value.shape, key
            assert ours[key].dtype == value.dtype, key


def test_the_average_of_a_block_without_preconditioner_is_not_scaled():
    config = ds.RootInvShampooPreconditionerConfig(inverse_exponent_override={1: 0.0})
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ds.DashShampoo(
        [param], lr=0.1, use_bias_correction=False, preconditioner_config=config
    )
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    average = optimizer.state_dict()["state"][0]["block_0"]["filtered_grad"]
    torch.testing.assert_close(average, torch.full((3,), 1 - 0.9**3))
