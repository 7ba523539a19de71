"""No step waits for the device: run with CUDA tensors that have no data, where reading one raises."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

import dash_shampoo as ds
from benchmarks.ours import CONFIGS
from tests.fake_device import FakeDevice, HostReadError

SHAPES = ((20, 13), (8, 8), (8, 8), (5, 9))
_EIGH = (
    "torch's eigh reports to the host whether it converged, and is told of finite matrices alone"
)
# Whose refresh waits by nature, and why.
WAITING = {
    "eigen": _EIGH,
    "kl": _EIGH,
    "eigendecomposed": _EIGH,
    "eigendecomposed_kl": _EIGH,
    "soap_eigh": _EIGH,
    "soap_qr": "the first basis is eigh's, and QR stops where the host sees that it has converged",
}
SETTLED_LATE = ("default", "soap_rotation")  # they have safety configs
ROOTS = ("coupled_newton", "newton_db", "newton_schulz", "chebyshev", "minimax", "minimax_auto")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        # Autocast, which is switched off for the solvers, finds no CUDA; pointers of fake tensors are 0.
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


@pytest.fixture
def device():
    with FakeDevice() as fake:
        yield fake


def make_optimizer(config, grafts=True, **options):
    parameters = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    settings = dict(
        lr=0.01,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        max_preconditioner_dim=8,
        precondition_frequency=2,
        start_preconditioning_step=2,
        grafting_config=ds.AdamPreconditionerConfig(beta2=0.99) if grafts else None,
        preconditioner_config=config,
        concurrency_config=ds.ConcurrencyConfig(enable_cuda_stream_for_param_groups=False),
    )
    return ds.DashShampoo(parameters, **{**settings, **options})


def of(name, **options):
    config = CONFIGS[name]
    if config.matrices_alone:
        options["distributed_config"] = ds.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=2
        )
    return make_optimizer(config.make(), config.grafts, **options)


def test_what_waits_is_known():
    assert WAITING.keys() < CONFIGS.keys()
    assert set(ROOTS) < CONFIGS.keys() - WAITING.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_step_reads_beside_the_statuses_of_a_refresh(device, name):
    optimizer = of(name)
    optimizer.step()
    # Statuses without a safety config; where a list follows a basis, whether each stack has one.
    device.allowed_reads = 10
    if name in WAITING:
        with pytest.raises(HostReadError):
            optimizer.step()
        device.allowed_reads = 0
        optimizer.step()
        return
    optimizer.step()
    device.allowed_reads = 0
    optimizer.step()
    device.allowed_reads = 1
    before = device.num_operations
    optimizer.step()
    assert device.allowed_reads == (name not in ROOTS)
    assert device.num_late_reads == (2 if name in SETTLED_LATE else 0)
    assert device.num_operations - before > 100


def test_a_read_raises(device):
    there = torch.ones(3, device="cuda")
    assert there.is_cuda
    host = torch.ones(3)
    for read in (
        lambda: bool(there.any()),
        lambda: float(there[0]),
        lambda: there.cpu(),
        lambda: there.to("cpu"),
        lambda: there.tolist(),
        lambda: there.nonzero(),
        lambda: there[there > 0],
        lambda: host.copy_(there),
        lambda: torch.linalg.eigh(torch.diag(there)),
    ):
        with pytest.raises(HostReadError):
            read()
    assert host.tolist() == [1.0, 1.0, 1.0]
    host.copy_(there, non_blocking=True)
    there.copy_(host, non_blocking=True)
    assert (device.num_late_reads, host.tolist()) == (1, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("is_staggered", [False, True])
@pytest.mark.parametrize("name", ROOTS)
def test_no_step_reads_anything_where_outcomes_are_settled_late(device, name, is_staggered):
    optimizer = make_optimizer(settled_late(name, stagger_refresh=is_staggered))
    for _ in range(4):
        optimizer.step()
    # The first refresh is of everything, in step 2; then follow two halves or one whole, in step 4.
    assert device.num_late_reads == (3 if is_staggered else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, whose driver is asked")
@pytest.mark.parametrize("name", ROOTS)
def test_the_driver_sees_no_wait(name):
    optimizer = make_optimizer(settled_late(name))
    for _ in range(4):  # kernels are compiled and constants brought to the device
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def settled_late(name, **options):
    return ds.DashShampooPreconditionerConfig(
        amortized_computation_config=CONFIGS[name].make().amortized_computation_config,
        safety=ds.SafetyConfig(policy="keep"),
        **options,
    )
