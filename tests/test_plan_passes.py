"""What `plan` says that an inverse root goes over, against what a pretended device is asked to do."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import dash_shampoo as ds
from benchmarks.device_counts import DeviceCounts
from dash_shampoo.inverse_root.stack import solve_stack
from dash_shampoo.planning.solver_cost import measure_solver
from dash_shampoo.products.fused import FUSED_PRECISIONS

B, N = 6, 64

CONFIGS = {
    "coupled_newton": ds.CoupledNewtonConfig(),
    "newton_db": ds.NewtonDBConfig(),
    "newton_schulz": ds.NewtonSchulzRootInvConfig(),
    "chebyshev": ds.ChebyshevConfig(),
    **{
        f"minimax {precision}": ds.MinimaxConfig(num_squarings=5, matmul_precision=precision)
        for precision in ("auto", *FUSED_PRECISIONS)
    },
}


def counted_passes(config, root, epsilon, residual_threshold):
    """Over the stack, with the write of the usable roots."""
    eigenvalues = 1e6 ** -torch.linspace(0.0, 1.0, N, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double()).Q
    A = ((Q * eigenvalues) @ Q.T).float()
    A = ((A + A.mT) / 2).expand(B, N, N).contiguous()
    roots = torch.zeros_like(A)

    def store(rows, value, usable):
        torch.where(usable[:, None, None], value, roots[rows], out=roots[rows])

    with DeviceCounts({}, default="solve") as device:
        device.place([A, roots])
        for _ in range(2):  # constants come from the host once
            device.reset()
            solve_stack(
                lambda rows: A[rows], store, num_matrices=B, size=N, root=root, config=config,
                epsilon=epsilon, dtype=A.dtype, device=A.device, max_workspace_bytes=2**40,
                residual_threshold=residual_threshold,
            )  # fmt: skip
        return device.counts.elements["solve"] / A.numel()


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need triton")
@pytest.mark.parametrize("residual_threshold", [None, 0.3])
@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_s_passes_are_those_that_are_counted(name, root, residual_threshold):
    config = CONFIGS[name]
    planned = measure_solver(config, root, 1e-6, torch.float32, residual_threshold).num_passes
    counted = counted_passes(config, root, 1e-6, residual_threshold)
    if name == "coupled_newton":
        # The plan's looks after every step whether the block is done; a device does so after every fourth.
        assert counted < planned < 2.2 * counted
        return
    # Diagonals, sketches and numbers per block are no N×N matrices: they count as nothing in the plan.
    assert planned == pytest.approx(counted, abs=0.6)
    assert planned <= counted + 0.01
    if name.startswith("minimax"):
        assert counted <= (4.2 if residual_threshold is None else 3.5)


def test_a_fused_square_moves_what_it_reads_and_writes():
    cost = measure_solver(ds.MinimaxConfig(num_squarings=5), 2, 0.0, torch.float32)
    assert cost.num_matmuls == cost.num_symmetric_matmuls == 5
    # A and A²; three times S, M and the next S; S, five rungs and the root.
    assert cost.num_moved == 2 + 3 * 3 + 7
    # A to M, the second rung; values that are not finite; the write.
    assert cost.num_passes == 4
    assert cost.elements_moved(64) == (18 + 2 * 4) * 64**2


def test_the_precision_does_not_change_what_is_moved():
    costs = {
        measure_solver(CONFIGS[f"minimax {precision}"], 2, 0.0, torch.float32, 0.3)
        for precision in ("auto", *FUSED_PRECISIONS)
    }
    assert len(costs) == 1
