"""The one entry to all solvers: checks, dispatch by config, and what every solver shares.

A solver is a function ``solver(A, root, config, epsilon) -> InverseRootResult`` on a clean stack:
(B, N, N) with B, N >= 1, contiguous, float32 or float64, finite (blocks that were not are replaced
by the identity, and their results discarded). It may not write to `A`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.config import (
    ChebyshevConfig,
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    MinimaxConfig,
    NewtonDBConfig,
    RootInvConfig,
    ScaledCoupledNewtonConfig,
)
from dash_shampoo.inverse_root import (
    chebyshev,
    coupled_higher_order,
    coupled_newton,
    eigen,
    minimax,
    newton_db,
)
from dash_shampoo.inverse_root.cpu_pool import chunk_rows, map_chunks
from dash_shampoo.inverse_root.residual import sketched_residual
from dash_shampoo.inverse_root.result import (
    InverseRootResult,
    InverseRootStatus,
    concatenate_results,
    make_result,
)

SolverFunction = Callable[[Tensor, Fraction, Any, float], InverseRootResult]


@dataclass(frozen=True)
class Solver:
    """A solver and what it can do.

    Attributes:
        function (SolverFunction): The solver itself.
        check (Callable): check(config, root) raises ValueError where it can't do them.
        max_chunked_size (float): The largest N for which a stack on the CPU is cut into chunks on
            several threads. Above about 192 a single product keeps all threads busy by itself;
            an eigendecomposition never does.
        max_chunk_bytes (int): The largest such chunk.
        has_residual (bool): Whether a sketched residual tells anything. Of an eigendecomposition it
            would measure the rounding of eigenvalues below machine precision times λ_max.
    """

    function: SolverFunction
    check: Callable[[Any, Fraction], None]
    max_chunked_size: float = 192
    max_chunk_bytes: int = 2**19
    has_residual: bool = True


_SOLVERS: dict[type[RootInvConfig], Solver] = {
    EigenConfig: Solver(
        eigen.eigen, eigen.check, max_chunked_size=float("inf"), has_residual=False
    ),
    CoupledNewtonConfig: Solver(coupled_newton.coupled_newton, coupled_newton.check),
    ScaledCoupledNewtonConfig: Solver(coupled_newton.coupled_newton, coupled_newton.check),
    CoupledHigherOrderConfig: Solver(
        coupled_higher_order.coupled_higher_order, coupled_higher_order.check
    ),
    NewtonDBConfig: Solver(newton_db.newton_db, newton_db.check),
    ChebyshevConfig: Solver(chebyshev.chebyshev, chebyshev.check),
    MinimaxConfig: Solver(minimax.minimax, minimax.check, max_chunk_bytes=2**21),
}


def as_root(root: int | float | Fraction) -> Fraction:
    """Turn a root into a fraction; a float within round-off of a small fraction becomes it.

    Args:
        root: p of A^(-1/p), positive and finite.

    Returns:
        The root.

    Raises:
        ValueError: If `root` is not a positive finite number.

    Examples:
        >>> as_root(4), as_root(1 / 0.3), as_root(8 / 3)
        (Fraction(4, 1), Fraction(10, 3), Fraction(8, 3))
    """
    if isinstance(root, bool) or not isinstance(root, (int, float, Fraction)):
        raise ValueError(f"{root=} must be a positive number.")
    if not 0 < root < float("inf"):
        raise ValueError(f"{root=} must be positive and finite.")
    exact = Fraction(root)
    simple = exact.limit_denominator(1000)
    return simple if abs(simple - exact) <= exact * Fraction(1, 10**14) else exact


def find_solver(config: object) -> Solver:
    """Find the solver of a config by its class, or else its nearest base class.

    Args:
        config: A solver config.

    Returns:
        The solver.

    Raises:
        ValueError: If no solver takes it.
    """
    for cls in type(config).__mro__:
        if cls in _SOLVERS:
            return _SOLVERS[cls]
    known = ", ".join(cls.__name__ for cls in _SOLVERS)
    raise ValueError(
        f"No inverse-root solver takes {type(config).__name__}; there are solvers for {known}."
    )


def check_supported(config: RootInvConfig, root: int | float | Fraction | None = None) -> None:
    """Refuse a config that no solver takes, or a root that its solver can't do.

    Args:
        config: A solver config.
        root: p of A^(-1/p); None checks the config alone.

    Raises:
        ValueError: If there is no solver for the config, or the solver can't do the root.

    Examples:
        >>> check_supported(NewtonDBConfig(), 4)
        >>> check_supported(NewtonDBConfig(), 3)
        Traceback (most recent call last):
        ValueError: root=3 is not one of 2, 4, 8, ...
    """
    solver = find_solver(config)
    if root is not None:
        solver.check(config, as_root(root))


_DEFAULT_CONFIG = EigenConfig()


def inverse_root(
    A: Tensor,
    root: int | float | Fraction,
    config: RootInvConfig = _DEFAULT_CONFIG,
    epsilon: float = 0.0,
    residual_threshold: float | None = None,
) -> InverseRootResult:
    """A^(-1/root) for each block of a stack, by the solver of the config.

    Every block is solved on its own: a block that holds NaN, or on which the solver fails, leaves
    the others bit-identical, and is reported in `status` instead of by an exception.

    Args:
        A: (B, N, N) stack, (..., N, N), or one (N, N) matrix: symmetric positive semi-definite up
            to rounding. float32 or float64; bf16 and fp16 are computed and returned in float32.
            Not modified.
        root: p of A^(-1/p), positive: 2 gives the inverse square root. A float may be a fraction
            such as 1/0.3, with solvers that accept it.
        config: The solver and its options. Default: `EigenConfig()`.
        epsilon: Damping: epsilon·I is added to A, as the solver's own formula says. Default: 0.
        residual_threshold: Test every root by its `sketched_residual`, and give those above this
            the status INACCURATE; 0.3 is a good value. `eigen` is not tested. Default: no test.

    Returns:
        The roots in the shape of `A`, and per block the status, iterations and residual.

    Raises:
        ValueError: If the shape, dtype, root or epsilon is not one of the above, if no solver
            takes the config, or the solver can't do the root.

    Note:
        Solvers with a fixed number of steps don't synchronise with the host; those with a
        stopping rule do once per step, `eigen` inside the eigendecomposition.

    Examples:
        >>> A = torch.diag(torch.tensor([4.0, 16.0])).expand(3, 2, 2)
        >>> result = inverse_root(A, root=2)
        >>> result.value[0].diagonal().tolist(), result.status.tolist()
        ([0.5, 0.25], [0, 0, 0])
    """
    fraction = as_root(root)
    solver = find_solver(config)
    solver.check(config, fraction)
    stack = _as_stack(A)
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"{epsilon=} must be finite and at least 0.")
    if residual_threshold is not None and not residual_threshold > 0.0:
        raise ValueError(f"{residual_threshold=} must be above 0, or None.")
    if stack.numel() == 0:
        return replace(make_result(stack.clone()), value=stack.reshape(A.shape).clone())

    def solve(rows: slice) -> InverseRootResult:
        return _solve(solver, stack[rows], fraction, config, float(epsilon), residual_threshold)

    result = concatenate_results(map_chunks(solve, _chunks(stack, solver)))
    return replace(result, value=result.value.reshape(A.shape))


def _chunks(stack: Tensor, solver: Solver) -> list[slice]:
    """The parts in which a stack is solved: on the CPU such that threads and caches serve best."""
    num_blocks, size, _ = stack.shape
    if stack.device.type != "cpu" or size > solver.max_chunked_size:
        return [slice(0, num_blocks)]
    return chunk_rows(
        num_blocks, size, stack.element_size(), torch.get_num_threads(), solver.max_chunk_bytes
    )


def _solve(
    solver: Solver,
    stack: Tensor,
    root: Fraction,
    config: RootInvConfig,
    epsilon: float,
    residual_threshold: float | None,
) -> InverseRootResult:
    """Solve a stack with bad blocks replaced by the identity, then mark them."""
    device_type = stack.device.type
    is_finite = _is_finite_block(stack)
    if not _is_all(is_finite):
        identity = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        stack = torch.where(is_finite[:, None, None], stack, identity)
    # Autocast would take the products of a step inside it down to half precision, unasked.
    can_autocast = torch.amp.is_autocast_available(device_type)
    with torch.autocast(device_type, enabled=False) if can_autocast else nullcontext():
        result = solver.function(stack, root, config, epsilon)
        if residual_threshold is not None and solver.has_residual:
            result = _tested(result, stack, root, residual_threshold)
    return _finish(result, is_finite)


def _tested(
    result: InverseRootResult, stack: Tensor, root: Fraction, threshold: float
) -> InverseRootResult:
    """The result with the sketched residual, and INACCURATE where that is above the threshold."""
    residual = sketched_residual(stack, result.value, root, result.damping)
    is_inaccurate = result.is_usable & (residual > threshold)
    status = result.status.masked_fill(is_inaccurate, int(InverseRootStatus.INACCURATE))
    return replace(result, residual=residual, status=status)


def _as_stack(A: Tensor) -> Tensor:
    """Check the input and see it as a contiguous (B, N, N) stack in the compute dtype."""
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be a stack of square matrices (..., N, N), not {tuple(A.shape)}.")
    if not A.dtype.is_floating_point:
        raise ValueError(f"A must be of a floating-point dtype, not {A.dtype}.")
    A = A.detach()
    if A.dtype not in (torch.float32, torch.float64):
        A = A.float()
    size = A.shape[-1]
    num_blocks = A.shape[:-2].numel()
    return A.reshape(num_blocks, size, size).contiguous()


def _is_finite_block(A: Tensor) -> Tensor:
    """(B,) bool: whether all entries of a block are finite."""
    if A.device.type == "cpu":
        # Sums of finite entries are finite but for overflow, and take one pass without a copy.
        is_finite = torch.isfinite(A.sum(dim=(-2, -1)))
        if bool(is_finite.all()):
            return is_finite
    return torch.isfinite(A.abs().amax(dim=(-2, -1)))


def _is_all(flags: Tensor) -> bool:
    """Whether all flags hold, or False where only a host sync could tell (not on the CPU)."""
    return flags.device.type == "cpu" and bool(flags.all())


def _finish(result: InverseRootResult, is_finite_input: Tensor) -> InverseRootResult:
    """Give every block that can't be used its status and NaN."""
    status, value = result.status, result.value
    is_finite = _is_finite_block(value)
    if not (_is_all(is_finite) and _is_all(is_finite_input)):
        is_failed = status == int(InverseRootStatus.FAILED)
        status = status.masked_fill(
            ~is_finite & ~is_failed, int(InverseRootStatus.NON_FINITE_RESULT)
        )
        status = status.masked_fill(~is_finite_input, int(InverseRootStatus.NON_FINITE_INPUT))
    is_bad = (
        (status == int(InverseRootStatus.NON_FINITE_INPUT))
        | (status == int(InverseRootStatus.NON_FINITE_RESULT))
        | (status == int(InverseRootStatus.FAILED))
    )
    if not _is_all(~is_bad):
        value = value.masked_fill(is_bad[:, None, None], torch.nan)
    return replace(result, value=value, status=status)
