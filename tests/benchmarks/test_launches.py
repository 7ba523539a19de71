"""What a step launches is known to the kernel; the counts are the same on every machine and base.

Where a change of the code changes a number here, `python benchmarks/launches.py --operations 30` shows of
what it is made. Fewer is better; more needs a reason.
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import dash_shampoo as ds
from benchmarks import launches
from benchmarks.cases import Case, llama
from benchmarks.device_counts import CUDA, DeviceCounts
from benchmarks.launches import CASES, CONFIGS, count_steps, factor_elements, main
from dash_shampoo.inverse_root import inverse_root

# The Llama of 458-of-128 at an eighth of its width: as many blocks and stacks, which launches go by.
SMALL_LLAMA = Case("458 blocks of 16", llama(8, 32, 32, 96), 16)


def count(case, config):
    return count_steps(case, ds.DashShampoo, preconditioner_config=CONFIGS[config].make())


def test_launches_of_a_llama_by_phase():
    with_refresh, without = count(CASES["458-of-128"], "default")
    steady = {
        "gather": 16, "factor update": 3, "precondition": 3, "grafting": 14, "elementwise": 24,
        # One addition per parameter.
        "update": 75,
    }  # fmt: skip
    assert +without.launches == steady
    assert +with_refresh.launches == steady | {"roots": 80}
    assert not without.waits
    assert not with_refresh.waits


@pytest.mark.parametrize(
    ("config", "launches", "waits", "passes", "mebibytes"),
    [
        ("default", 158, 0, 3.4, 27.4),
        ("eigen", 85, 7, 8.1, 18.4),
        ("coupled_newton", 234, 1, 18.1, 34.5),
        ("newton_db", 261, 1, 9.3, 22.3),
        ("newton_schulz", 256, 1, 21.8, 26.4),
        ("chebyshev", 232, 1, 20.2, 46.7),
        ("minimax", 202, 1, 4.1, 54.9),
    ],
)
def test_launches_waits_passes_and_memory_of_a_refresh(config, launches, waits, passes, mebibytes):
    counts, _ = count(CASES["146-of-64"], config)
    assert counts.launches["roots"] == launches
    assert sum(counts.waits.values()) == waits
    elements = factor_elements(CASES["146-of-64"])
    assert round(counts.elements["roots"] / elements, 1) == passes
    assert round(counts.peak_bytes / 2**20, 1) == mebibytes


@pytest.mark.skipif(find_spec("triton") is None, reason="the fused square needs triton")
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16x3", "tf32", "fp16", "bf16"])
def test_a_refresh_goes_four_times_over_the_stacks_beside_fused_products(precision):
    default = CONFIGS["default"].make()
    solver = replace(default.amortized_computation_config, matmul_precision=precision)
    config = replace(default, amortized_computation_config=solver)
    case = CASES["146-of-64"]
    counts, _ = count_steps(case, ds.DashShampoo, preconditioner_config=config)
    assert counts.launches["roots"] == 158
    # A to M, the second rung, the write of usable roots; the rest is the sketch.
    assert round(counts.elements["roots"] / factor_elements(case), 1) == 3.4
    assert not counts.waits


@pytest.mark.parametrize(
    ("config", "launches", "num_products"),
    [
        # Of the roots 2 and 4: products by structure, in the solvers' docstrings.
        ("coupled_newton", 153, 29 + 39),
        ("newton_db", 162, 27 + 54),
        ("chebyshev", 155, 14 + 14),
        ("minimax", 134, 9 + 12),
        ("newton_schulz", 162, 33 + 54),
    ],
)
def test_a_refresh_of_a_llama_takes_300_launches_and_one_wait(config, launches, num_products):
    counts, without = count(SMALL_LLAMA, config)
    assert counts.launches["roots"] == launches > num_products
    assert sum(counts.launches.values()) <= 300
    assert sum(counts.waits.values()) == 1
    assert not without.waits


@pytest.mark.parametrize("config", ["coupled_newton", "newton_db", "chebyshev", "minimax"])
def test_nobody_waits_where_outcomes_are_settled_late(config):
    # Under "repair" the blocks that are bad, of which Newton-DB leaves some here, are waited for.
    solver = CONFIGS[config].make().amortized_computation_config
    settled_late = ds.DashShampooPreconditionerConfig(
        amortized_computation_config=solver, safety=ds.SafetyConfig(policy="keep")
    )
    both = count_steps(CASES["146-of-64"], ds.DashShampoo, preconditioner_config=settled_late)
    assert [sum(counts.waits.values()) for counts in both] == [0, 0]


@pytest.mark.parametrize(("max_iterations", "waits"), [(10, 0), (16, 0), (100, 8)])
def test_roots_of_coupled_newton_without_looking(max_iterations, waits):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 24, 24, generator=generator) / 24**0.5
    A = factors @ factors.mT + torch.diag(torch.logspace(0, -2, 24))
    A[3, 0, 0] = torch.nan
    config = ds.CoupledNewtonConfig(max_iterations=max_iterations, tolerance=1e-5)
    expected = inverse_root(A, 4, config, 1e-3)
    with DeviceCounts({}, default="outside") as device:
        device.place([A])
        inverse_root(A, 4, config, 1e-3)  # brings constants to the device, once
        device.reset()
        result = inverse_root(A, 4, config, 1e-3)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert result.status.equal(expected.status)
    assert sum(device.counts.waits.values()) == waits


def test_every_phase_has_a_column():
    assert set(launches.PHASES.values()) < set(launches.PHASE_NAMES)


def test_the_table(capsys):
    text = main(["--case", "146-of-64", "--configs", "newton_db", "--operations", "2"])
    assert capsys.readouterr().out == text
    assert [line.split("|")[1].strip() for line in text.splitlines() if "newton_db" in line] == [
        "newton_db", "newton_db",
    ]  # fmt: skip
    assert "_foreach_" in text


# --------------------------------------------------------------------------- what is counted


@pytest.fixture
def device():
    with DeviceCounts({}, default="outside") as counting:
        yield counting


def on_device(device, *tensors):
    device.place(tensors)
    return tensors


def test_a_tensor_there_and_what_is_made_of_it_say_so(device):
    host = torch.ones(3)
    (there,) = on_device(device, torch.ones(3))
    for tensor in (there, there + host, there.view(3, 1), there.double(), torch.zeros_like(there)):
        assert tensor.is_cuda
        assert tensor.device.type == "cuda"
    for tensor in (host, host + 1, there.cpu(), there.to("cpu")):
        assert not tensor.is_cuda
        assert tensor.device.type == "cpu"
    assert torch.zeros(2, device=there.device).is_cuda
    assert host.to(there.device).is_cuda
    assert host.to(there).is_cuda
    assert torch.equal(there.cpu(), torch.ones(3))


def test_views_and_empty_tensors_are_free(device):
    (there,) = on_device(device, torch.ones(4, 4))
    there.mT[1:].unsqueeze(0), torch.empty_like(there), torch.empty(3, device=CUDA)
    assert sum(device.counts.launches.values()) == 0


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        (lambda a: a @ a, 1),
        (lambda a: a.mul_(2), 1),
        (lambda a: torch.baddbmm(a[None], a[None], a[None]), 2),
        (lambda a: torch.baddbmm(b := a[None] + 1, a[None], a[None], beta=0.0, out=b), 2),
        (lambda a: torch.baddbmm(a[None], a[None], a[None], out=a[None] + 1), 3),
        (lambda a: a.masked_fill(a > 0, 1.0), 3),
        (torch.isfinite, 4),
        (lambda a: torch.stack([a] * 129), 2),
        (lambda a: torch.stack([a.mT] * 65), 2),
        (lambda a: torch._foreach_mul_([a] * 111, 2.0), 2),
        (lambda a: torch._foreach_mul([a] * 64, 2.0), 1),
        (lambda a: torch._foreach_mul([a] * 65, 2.0), 2),
        (lambda a: torch._foreach_addcmul_([a] * 49, [a] * 49, [a] * 49), 2),
        (lambda a: torch._foreach_norm([a] * 9), 3),
        (lambda a: torch._foreach_add_([a[:, :2]] * 9, [a[:, :2]] * 9), 9),
        (lambda a: torch._foreach_add([a] * 9, [a.mT] * 9), 9),
    ],
)
def test_launches(device, operation, number):
    (there,) = on_device(device, torch.ones(4, 4))
    operation(there)
    assert sum(device.counts.launches.values()) == number


def test_a_launch_of_a_foreach_operation_takes_320_chunks(device):
    (there,) = on_device(device, torch.ones(65536 * 100))
    torch._foreach_mul_([there] * 7, 2.0)
    assert sum(device.counts.launches.values()) == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda a, b: bool(a.any()),
        lambda a, b: float(a[0]),
        lambda a, b: a.sum().item(),
        lambda a, b: a.tolist(),
        lambda a, b: a.cpu(),
        lambda a, b: a.nonzero(),
        lambda a, b: a[a > 0],
        lambda a, b: a.copy_(b),
        lambda a, b: torch.tensor([1.0], device=a.device),
        lambda a, b: b.to(a.device),
        lambda a, b: torch.linalg.eigh(a.diag()),
    ],
)
def test_waits(device, wait):
    (there,) = on_device(device, torch.ones(3))
    wait(there, torch.ones(3))
    assert sum(device.counts.waits.values()) == 1


def test_what_does_not_wait(device):
    (there,) = on_device(device, torch.ones(3))
    host = torch.ones(3)
    there.copy_(host, non_blocking=True)
    float(host[0]), host.tolist(), torch.where(there > 0, there, 0.0), torch.zeros(3, device=CUDA)
    assert not device.counts.waits


def test_phases_are_those_of_the_innermost_function():
    def outer():
        product()
        there.mul_(2)

    def product():
        there.mul_(2)
        bool(there.all())

    there = torch.ones(3)
    phases = {r"\.product$": "inside", r"\.outer$": "around"}
    with DeviceCounts(phases, default="outside") as device:
        device.place([there])
        outer()
        there.mul_(2)
    assert device.counts.launches == {"inside": 3, "around": 1, "outside": 1}
    assert device.counts.waits == {"inside": 1}


def test_peak_of_what_is_alive(device):
    (there,) = on_device(device, torch.ones(256))
    a = there + 1
    b = there + 2
    del a
    c = there + 3
    del b, c
    there.add_(there + 4)
    assert device.counts.peak_bytes == 2 * 1024
