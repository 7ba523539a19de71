"""Failed roots and bad values, block by block, as the base's own list treats them."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch

import dash_shampoo as ds

NUM_BLOCKS = 3  # 8x8 each; with beta2 = 0 a factor matrix is that of the last gradient alone


def construct(optimizer_class, solver, tolerated=1, **options):
    config = ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=solver,
        num_tolerated_failed_amortized_computations=tolerated,
        **options,
    )
    params = {f"layer{i}.weight": torch.nn.Parameter(torch.zeros(8, 8)) for i in range(NUM_BLOCKS)}
    optimizer = optimizer_class(
        list(params.items()),
        lr=0.1,
        betas=(0.0, 0.0),
        epsilon=1e-6,
        max_preconditioner_dim=8,
        preconditioner_config=config,
    )
    return optimizer, list(params.values())


def blocks(optimizer):
    lists = optimizer._per_group_state_lists[0]["shampoo_preconditioner_list"]
    return lists._local_kronecker_factors_unwrapped


def step(optimizer, params, bad):
    """A step in which block i gets the kind of gradient that `bad[i]` names; well-conditioned else."""
    for index, p in enumerate(params):
        torch.manual_seed(index)
        grad = torch.linalg.qr(torch.randn(8, 8))[0].contiguous()
        match bad.get(index):
            case "singular":
                grad = grad[:, :1] @ grad[:1]
            case "zero":
                grad = torch.zeros(8, 8)
            case "nan" | "inf" as value:
                grad[3, 4] = float(value)
            case "absent":
                grad = None
        p.grad = grad
    try:
        optimizer.step()
    except ValueError as error:
        return type(error)
    return None


UNDAMPED = ds.CoupledHigherOrderConfig(rel_epsilon=0.0, abs_epsilon=0.0)

# Per step which block gets which gradient.
HISTORIES = {
    "tolerated": [{}, {1: "singular"}, {}],
    "reset by a success": [{1: "singular"}, {}, {1: "singular"}, {}],
    "too many in a row": [{}, {1: "singular"}, {1: "singular"}],
    "two blocks, one too often": [{2: "singular"}, {0: "singular", 2: "singular"}],
    "absent blocks neither fail nor reset": [{1: "singular"}, {1: "absent"}, {1: "singular"}],
    "a matrix of zeros": [{1: "zero"}, {}, {0: "zero", 1: "zero"}],
    "nan": [{}, {2: "nan", 1: "nan"}],
    "inf": [{}, {1: "inf"}],
    "a failure too many before nan": [{0: "singular"}, {0: "singular", 1: "nan"}],
    "nan before a failure too many": [{1: "singular"}, {0: "nan", 1: "singular"}],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=list(HISTORIES))
def test_counters_roots_and_errors_are_those_of_the_base(history):
    expected, expected_params = construct(ds.DistributedShampoo, UNDAMPED)
    found, params = construct(ds.DashShampoo, UNDAMPED)
    for bad in history:
        error = step(expected, expected_params, bad)
        found_error = step(found, params, bad)
        if found_error is ds.PreconditionerValueError and error is ValueError:
            # A gradient that is not finite is refused before any root is computed.
            assert {"nan", "inf"} & set(bad.values())
            break
        assert found_error is error
        if error is ds.PreconditionerValueError:
            break  # the base stops there and then, with the later blocks as they were
        for mine, others in zip(blocks(found), blocks(expected), strict=True):
            assert (
                mine._failed_amortized_computation_counter
                == others._failed_amortized_computation_counter
            )
            if error is None:
                torch.testing.assert_close(
                    mine.inv_factor_matrices, others.inv_factor_matrices, rtol=1e-4, atol=1e-5
                )


def test_the_histories_end_in_every_way():
    endings = set()
    for history in HISTORIES.values():
        optimizer, params = construct(ds.DistributedShampoo, UNDAMPED)
        endings.add([step(optimizer, params, bad) for bad in history][-1])
    assert endings == {None, ValueError, ds.PreconditionerValueError}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({2: "nan", 1: "nan"}, r"1\.block_0 of layer1\.weight.*nan or inf"),
        ({0: "inf"}, r"0\.block_0 of layer0\.weight.*nan or inf"),
        ({2: "singular", 1: "singular"}, r"1\.block_0\.0 of layer1\.weight.*1 times in a row"),
    ],
)
def test_the_lowest_block_and_its_parameter_are_named(bad, message):
    optimizer, params = construct(ds.DashShampoo, UNDAMPED, tolerated=0)
    for index, p in enumerate(params):
        torch.manual_seed(index)
        p.grad = torch.linalg.qr(torch.randn(8, 8))[0].contiguous()
    for index, kind in bad.items():
        grad = params[index].grad
        if kind == "singular":
            params[index].grad = grad[:, :1] @ grad[:1]
        else:
            grad[3, 4] = float(kind)
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("kind", ["nan", "singular"])
def test_an_error_leaves_no_trace_outside(kind, monkeypatch):
    """Meta's list writes the matrix to /tmp and changes how tensors are printed."""
    traces = []
    open_file = builtins.open

    def watched(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            traces.append(file)
        return open_file(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: traces.append(args[1:]))
    monkeypatch.setattr(torch, "set_printoptions", lambda **options: traces.append(options))
    print_options = copy.copy(torch._tensor_str.PRINT_OPTS)

    optimizer, params = construct(ds.DashShampoo, UNDAMPED)
    errors = [step(optimizer, params, {1: kind}) for _ in range(2)]
    assert errors[-1] is not None
    assert traces == []
    assert vars(torch._tensor_str.PRINT_OPTS) == vars(print_options)


@pytest.mark.parametrize("optimizer_class", [ds.DistributedShampoo, ds.DashShampoo])
def test_the_eager_check_of_gradients_is_that_of_the_base(optimizer_class):
    params = [torch.nn.Parameter(torch.zeros(8, 8))]
    optimizer = optimizer_class(
        params,
        precondition_frequency=10,
        shampoo_runtime_config=ds.base.ShampooRuntimeConfig(eager_nan_check=True),
    )
    params[0].grad = torch.full((8, 8), torch.nan)
    with pytest.raises(AssertionError, match=r"(?i)nan"):
        optimizer.step()


def test_parameters_of_several_groups_without_names_are_numbered_as_in_the_state_dict():
    params = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    optimizer = ds.DashShampoo([{"params": params[:2]}, {"params": params[2:]}])
    for p in params:
        p.grad = torch.eye(8)
    params[2].grad[0, 0] = torch.nan
    with pytest.raises(ds.PreconditionerValueError, match="of parameter 2 "):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", [ds.DistributedShampoo, ds.DashShampoo])
@pytest.mark.parametrize("packing", [True, False])
def test_a_root_that_overflows_its_dtype_raises(optimizer_class, packing):
    optimizer, params = construct(
        optimizer_class,
        ds.EigenConfig(),
        inv_factor_matrix_dtype=torch.float16,
        inverse_exponent_override={2: 1.0},  # of zeros and 1e-6, it is 1e6
        use_symmetric_packing=packing,
    )
    assert step(optimizer, params, {1: "zero"}) is ds.PreconditionerValueError
    for block in blocks(optimizer):
        assert all(root.isfinite().all() for root in block.inv_factor_matrices)


def test_with_safety_a_root_that_overflows_its_dtype_is_kept():
    config = ds.DashShampooPreconditionerConfig(
        inv_factor_matrix_dtype=torch.float16,
        inverse_exponent_override={2: 1.0},
        safety=ds.SafetyConfig(),
    )
    params = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    optimizer = ds.DashShampoo(
        params, epsilon=1e-6, max_preconditioner_dim=8, preconditioner_config=config
    )
    params[0].grad, params[1].grad = torch.eye(8), torch.zeros(8, 8)
    optimizer.step()
    roots = [block.inv_factor_matrices[0] for block in blocks(optimizer)]
    assert all(root.isfinite().all() for root in roots)
    assert optimizer.failure_counts() == {"parameter 1": 2}
