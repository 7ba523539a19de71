"""What the embedded base refuses, and what its messages name."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
import torch

import dash_shampoo.base as door
import dash_shampoo.base.embedded as embedded
from dash_shampoo.base.embedded import matrix_functions
from tests.base.cases import gradients, parameters, take_steps

INFINITE = float("inf")
PSEUDO = embedded.RootInvShampooPreconditionerConfig(
    amortized_computation_config=embedded.EigenConfig(
        rank_deficient_stability_config=embedded.PseudoInverseConfig()
    )
)
CORRECTED = embedded.WeightDecayType.CORRECTED

# Options, and what the message must say: name, value, range.
WRONG_OPTIONS = [
    ({"lr": -1.0}, r"lr=-1.0: must be >= 0.0"),
    ({"lr": float("nan")}, r"lr=nan: must be >= 0.0"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0: must be in \[0.0, 1.0\)"),
    ({"betas": (0.9, 1.1)}, r"betas\[1\]=1.1: must be in \[0.0, 1.0\]"),
    ({"beta3": 1.0}, r"beta3=1.0: must be in \[0.0, 1.0\)"),
    ({"epsilon": 0.0}, r"epsilon=0.0: must be > 0.0"),
    ({"epsilon": 1e-8, "preconditioner_config": PSEUDO}, r"epsilon=1e-08: must be 0.0 when Pseudo"),
    ({"weight_decay": -0.1}, r"weight_decay=-0.1: must be >= 0.0"),
    ({"lr": 0.0, "weight_decay_type": CORRECTED}, r"peak_lr=0.0: must be > 0.0"),
    ({"max_preconditioner_dim": 2.5}, r"max_preconditioner_dim=2.5: must be an int or math.inf"),
    ({"max_preconditioner_dim": 0}, r"max_preconditioner_dim=0: must be >= 1"),
    ({"precondition_frequency": 0}, r"precondition_frequency=0: must be >= 1"),
    ({"start_preconditioning_step": -2}, r"start_preconditioning_step=-2: must be >= "),
    (
        {"precondition_frequency": 5, "start_preconditioning_step": 2},
        r"start_preconditioning_step=2: must be >= precondition_frequency=5",
    ),
    ({"preconditioner_config": None}, r"preconditioner_config=None"),
]

WRONG_CONFIGS = [
    (embedded.AdaGradPreconditionerConfig, {"epsilon": 0.0}, r"epsilon=0.0: must be > 0.0"),
    (embedded.AdamPreconditionerConfig, {"beta2": 0.0}, r"beta2=0.0: must be in \(0.0, 1.0\]"),
    (
        embedded.RootInvShampooPreconditionerConfig,
        {"num_tolerated_failed_amortized_computations": -1},
        r"num_tolerated_failed_amortized_computations=-1: must be >= 0",
    ),
    (
        embedded.RootInvShampooPreconditionerConfig,
        {"use_trace_scaling": True, "trace_scaling_exponent": 0.0},
        r"trace_scaling_exponent=0.0: must be in \(0.0, 1.0\]",
    ),
    (
        embedded.RootInvShampooPreconditionerConfig,
        {"inverse_exponent_override": {2: {2: 0.5}}},
        r"dimension in inverse_exponent_override\[2\]=2: must be in \[0, 1\]",
    ),
    (
        embedded.RootInvShampooPreconditionerConfig,
        {"inverse_exponent_override": {2: -0.5}},
        r"inverse_exponent_override\[2\]=-0.5: must be >= 0.0",
    ),
    (embedded.EigenConfig, {"tolerance": 0.1}, r"tolerance=0.1: must be 0.0"),
    (embedded.EighEigendecompositionConfig, {"tolerance": 1.1}, r"tolerance=1.1: must be in"),
    (embedded.ClassicMomentumConfig, {"momentum": 0.0}, r"momentum=0.0: must be in \(0.0, 1.0\)"),
    (embedded.ClassicMomentumConfig, {"dampening": 1.0}, r"dampening=1.0: must be in \[0.0, 1.0\)"),
    (
        embedded.GeneralizedPrimalAveragingConfig,
        {"eval_interp_coeff": 1.0},
        r"eval_interp_coeff=1.0: must be in \[0.0, 1.0\)",
    ),
    (embedded.ScheduleFreeConfig, {"train_interp_coeff": 0.0}, r"train_interp_coeff=0.0: must be"),
    (
        embedded.SingleDeviceDistributedConfig,
        {"target_parameter_dimensionality": 1.5},
        r"target_parameter_dimensionality=1.5: must be an int or math.inf",
    ),
    (
        embedded.FullyShardDistributedConfig,
        {"num_sub_groups": 2},
        r"num_sub_groups=2: must be 1 when param_assignment_strategy is DEFAULT",
    ),
]

QR = embedded.EigendecomposedShampooPreconditionerConfig(
    amortized_computation_config=embedded.QREigendecompositionConfig()
)
LEFT_TO_META = [
    {"preconditioner_config": embedded.DefaultSOAPConfig},
    {"preconditioner_config": embedded.DefaultEigenvalueCorrectedShampooConfig},
    {"preconditioner_config": embedded.EigendecomposedShampooPreconditionerConfig()},
    {"preconditioner_config": embedded.EigendecomposedKLShampooPreconditionerConfig()},
    {"preconditioner_config": embedded.RootInvKLShampooPreconditionerConfig()},
    {"preconditioner_config": embedded.DefaultSpectralDescentPreconditionerConfig},
    {"preconditioner_config": embedded.DefaultSignDescentPreconditionerConfig},
    {"preconditioner_config": QR},
    {"grafting_config": embedded.DefaultSignDescentPreconditionerConfig},
    *(
        {
            "distributed_config": embedded.FullyShardDistributedConfig(
                param_assignment_strategy=strategy
            )
        }
        for strategy in (
            embedded.FSDPParamAssignmentStrategy.REPLICATE,
            embedded.FSDPParamAssignmentStrategy.ROUND_ROBIN,
        )
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_hyper_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        embedded.DistributedShampoo(parameters(), **options)


@pytest.mark.parametrize(("cls", "arguments", "message"), WRONG_CONFIGS)
def test_wrong_config_fields_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    "options", LEFT_TO_META, ids=lambda o: type(next(iter(o.values()))).__name__
)
def test_what_only_meta_has_is_refused_by_name(options):
    (config,) = options.values()
    with pytest.raises(NotImplementedError, match="Meta's distributed_shampoo package") as error:
        embedded.DistributedShampoo(parameters(), **options)
    assert type(config).__name__ in str(error.value)


def abstract_configs():
    classes = [getattr(embedded, n, None) for n in door.__all__]
    return [c for c in classes if isinstance(c, type) and getattr(c, "_is_abstract", False)]


def test_abstract_configs_cannot_be_made():
    assert len(abstract_configs()) >= 10
    for cls in abstract_configs():
        with pytest.raises(TypeError, match=f"{cls.__name__} is abstract"):
            cls()


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="non-empty list"):
        embedded.DistributedShampoo([{"params": []}])


def test_groups_cannot_be_added_later():
    optimizer = embedded.DistributedShampoo(parameters())
    with pytest.raises(RuntimeError, match="construct a new one"):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1


def test_unknown_solvers_are_refused_at_construction():
    class Unknown(embedded.RootInvConfig):
        pass

    class Repair(embedded.RankDeficientStabilityConfig):
        pass

    for solver in (Unknown(), embedded.EigenConfig(rank_deficient_stability_config=Repair())):
        config = embedded.RootInvShampooPreconditionerConfig(amortized_computation_config=solver)
        with pytest.raises(NotImplementedError, match=r"Unknown|Repair"):
            embedded.DistributedShampoo(parameters(), preconditioner_config=config)


def test_roots_that_the_solver_cannot_do_are_refused_at_construction():
    config = embedded.RootInvShampooPreconditionerConfig(
        amortized_computation_config=embedded.CoupledNewtonConfig(),
        inverse_exponent_override={2: 0.3},
    )
    with pytest.raises(ValueError, match=r"root=3\.33.*integer root; use EigenConfig"):
        embedded.DistributedShampoo(
            parameters(), max_preconditioner_dim=8, preconditioner_config=config
        )


def test_gradients_are_checked_on_request():
    params = parameters(shapes=[(2, 3), (4,)])
    optimizer = embedded.DistributedShampoo(
        params, shampoo_runtime_config=embedded.ShampooRuntimeConfig(eager_nan_check=True)
    )
    params[1].grad = torch.tensor([1.0, 2.0, float("nan"), 0.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"parameter 1 of its group, of shape \(4,\)"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = embedded.DistributedShampoo([param])
    param.grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("named", [False, True])
def test_a_nan_names_factor_and_parameter_and_writes_nothing(named, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Meta's package writes to this file.
    dump = Path("/tmp/1_block_1_0.pt")
    existed = dump.exists()
    options = torch._tensor_str.PRINT_OPTS
    before = (options.precision, options.linewidth, options.threshold)
    params = parameters(shapes=[(4,), (12, 4)])
    given = [("bias", params[0]), ("weight", params[1])] if named else params
    optimizer = embedded.DistributedShampoo(given, max_preconditioner_dim=8)
    params[1].grad = torch.ones(12, 4, dtype=torch.float64)
    params[1].grad[10, 1] = float("nan")
    values = params[1].detach().clone()
    with pytest.raises(embedded.PreconditionerValueError) as error:
        optimizer.step()
    assert "1.block_1.0" in str(error.value)
    assert "decrease the learning rate" in str(error.value)
    assert ("of parameter weight" in str(error.value)) is named
    assert torch.equal(params[1], values)
    assert (options.precision, options.linewidth, options.threshold) == before
    assert dump.exists() == existed
    assert not list(tmp_path.iterdir())


def failing(num_failures, monkeypatch):
    """Makes so many inverse roots of 3×3 matrices fail."""
    original = matrix_functions.matrix_inverse_root
    calls = iter(range(1000))

    def patched(A, *args):
        if A.shape[0] == 3 and next(calls) < num_failures:
            raise torch.linalg.LinAlgError("did not converge")
        return original(A, *args)

    monkeypatch.setattr("dash_shampoo.base.embedded.shampoo_list.matrix_inverse_root", patched)


def test_tolerated_failures_keep_the_previous_root(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    failing(2, monkeypatch)
    params = parameters(shapes=[(3, 4)])
    optimizer = embedded.DistributedShampoo(params, max_preconditioner_dim=4)
    roots = optimizer.state[params[0]]["block_0"]["shampoo"]["inv_factor_matrices"]
    steps = gradients(3, shapes=[(3, 4)])
    take_steps(optimizer, params, steps[:2])
    identity = torch.eye(3)[torch.triu_indices(3, 3).unbind()]
    assert torch.equal(roots[0], identity)
    assert "factor matrix 0.block_0.0 failed (did not converge)" in caplog.text
    take_steps(optimizer, params, steps[2:])
    assert not torch.equal(roots[0], identity)
    factors = optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"]
    block = factors._local_kronecker_factors_unwrapped[0]
    assert block._failed_amortized_computation_counter == 0


def test_too_many_failures_raise(monkeypatch):
    failing(100, monkeypatch)
    params = parameters(shapes=[(3, 4)])
    config = embedded.RootInvShampooPreconditionerConfig(
        num_tolerated_failed_amortized_computations=1
    )
    optimizer = embedded.DistributedShampoo(
        params, max_preconditioner_dim=4, preconditioner_config=config
    )
    steps = gradients(2, shapes=[(3, 4)])
    take_steps(optimizer, params, steps[:1])
    with pytest.raises(ValueError, match=r"'0.block_0.0', '0.block_0.1'.*failed 2 times in a row"):
        take_steps(optimizer, params, steps[1:])
