"""The embedded base against the float64 reference, on identical gradients."""

from __future__ import annotations

import random

import pytest
import torch

import dash_shampoo.base.embedded as embedded
from tests.base.cases import gradients, parameters, relative_error, take_steps
from tests.grids import pairwise
from tests.reference.shampoo import Options, ReferenceShampoo

# Both compute in float64 from the same formulas; what is left is rounding, amplified by roots of factors
# whose condition is at most 1e6 or so (epsilon 1e-4).
TOLERANCE = 1e-10

OPTIONS = {
    "grafting": [None, "SGD", "AdaGrad", "RMSprop", "Adam"],
    "drop_weighting_factor": [False, True],
    "weight_decay_type": ["L2", "DECOUPLED", "CORRECTED", "INDEPENDENT"],
    "betas": [(0.9, 1.0), (0.9, 0.99), (0.0, 0.99)],
    "beta3": [None, 0.5],
    "use_bias_correction": [True, False],
    "averaging": [None, "momentum", "nesterov", "primal", "schedule_free"],
    "schedule": [(1, 1), (2, 4), (3, 3)],
    "exponents": [{}, {1: 0.0, 2: 0.5}, {2: {0: 0.3}, 3: {1: 0.0}}],
    "use_trace_scaling": [False, True],
    "missing": ["never", "some", "changing"],
    "peak_lr": [None, 0.4],
}
# Every pair of settings, and many settings at once by lot.
LOT = random.Random(0)
GRID = pairwise(OPTIONS) + [
    {name: LOT.choice(values) for name, values in OPTIONS.items()} for _ in range(25)
]


def reference_options(case):
    averaging = case["averaging"]
    frequency, start = case["schedule"]
    names = ("grafting", "drop_weighting_factor", "weight_decay_type", "beta3", "exponents")
    names += ("use_bias_correction", "use_trace_scaling", "peak_lr")
    return Options(
        **{name: case[name] for name in names},
        lr=0.1,
        epsilon=1e-4,
        beta1=case["betas"][0],
        beta2=case["betas"][1],
        weight_decay=0.05,
        precondition_frequency=frequency,
        start_preconditioning_step=start,
        momentum={"momentum": (0.9, 0.0, False), "nesterov": (0.8, 0.1, True)}.get(averaging),
        primal_averaging=(0.9, 0.7) if averaging == "primal" else None,
        schedule_free=(0.8, 2) if averaging == "schedule_free" else None,
    )


def embedded_options(options):
    """The constructor's arguments for the reference's options."""
    o = options
    grafting = None
    if o.grafting is not None:
        arguments = {}
        if o.grafting != "SGD":
            arguments["epsilon"] = o.grafting_epsilon
        if o.grafting in ("RMSprop", "Adam"):
            arguments["beta2"] = o.grafting_beta2
            arguments["drop_weighting_factor_on_gsquare"] = o.drop_weighting_factor
        grafting = getattr(embedded, f"{o.grafting}PreconditionerConfig")(**arguments)
    averaging = None
    if o.momentum:
        names = ("momentum", "dampening", "use_nesterov")
        averaging = embedded.ClassicMomentumConfig(**dict(zip(names, o.momentum, strict=True)))
    elif o.primal_averaging:
        names = ("eval_interp_coeff", "train_interp_coeff")
        averaging = embedded.GeneralizedPrimalAveragingConfig(
            **dict(zip(names, o.primal_averaging, strict=True))
        )
    elif o.schedule_free:
        names = ("train_interp_coeff", "eval_coeff_lr_power")
        averaging = embedded.ScheduleFreeConfig(**dict(zip(names, o.schedule_free, strict=True)))
    return dict(
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        beta3=-1.0 if o.beta3 is None else o.beta3,
        epsilon=o.epsilon,
        weight_decay=o.weight_decay,
        weight_decay_type=embedded.WeightDecayType[o.weight_decay_type],
        max_preconditioner_dim=o.max_preconditioner_dim,
        precondition_frequency=o.precondition_frequency,
        start_preconditioning_step=o.start_preconditioning_step,
        use_bias_correction=o.use_bias_correction,
        iterate_averaging_config=averaging,
        grafting_config=grafting,
        preconditioner_config=embedded.RootInvShampooPreconditionerConfig(
            factor_matrix_dtype=torch.float64,
            inv_factor_matrix_dtype=torch.float64,
            inverse_exponent_override=o.exponents,
            use_trace_scaling=o.use_trace_scaling,
            drop_weighting_factor_on_gsquare=o.drop_weighting_factor,
        ),
    )


def test_the_grid_is_not_empty():
    print(f"reference grid: {len(GRID)} cases")
    assert len(GRID) >= 50


@pytest.mark.parametrize("case", GRID, ids=[f"case{i}" for i in range(len(GRID))])
def test_embedded_equals_the_reference(case):
    options = reference_options(case)
    params = parameters()
    reference = ReferenceShampoo(params, options)
    group = {"params": params}
    if options.peak_lr is not None:
        group["peak_lr"] = options.peak_lr
    optimizer = embedded.DistributedShampoo([group], **embedded_options(options))
    steps = gradients(7, case["missing"])
    take_steps(optimizer, params, steps)
    for grads in steps:
        reference.step(grads)
    for found, expected in zip(params, reference.params(), strict=True):
        assert relative_error(found, expected) <= TOLERANCE, case
    if options.primal_averaging or options.schedule_free:
        optimizer.eval()
        for found, expected in zip(params, reference.evaluation_params(), strict=True):
            # The averaged sequence goes through 1 - 1/mu_y in single precision.
            assert relative_error(found, expected) <= 1e-6, case
        optimizer.train()
        for found, expected in zip(params, reference.params(), strict=True):
            assert relative_error(found, expected) <= 1e-6, case
