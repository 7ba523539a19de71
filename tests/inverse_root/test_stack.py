"""Stacks solved under a cap: what is loaded, stored and allocated, and how often a stack is passed over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dash_shampoo.inverse_root import (
    InverseRootStatus,
    MinimaxConfig,
    NewtonDBConfig,
    inverse_root,
    solve_stack,
)
from dash_shampoo.inverse_root.registry import SOLVERS as REGISTRY
from dash_shampoo.inverse_root.registry import config_for_root
from tests.inverse_root.solver_table import SOLVERS, Row
from tests.reference.inverse_root import random_spd

each_row = pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)
NO_CAP = 2**62


class Allocations(TorchDispatchMode):
    """Bytes of the CPU tensors that are alive, from the storages that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, object] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self._seen:
                    self._add(key, storage)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.finalize(storage, gone)


def solved(A: torch.Tensor, row: Row, root: float, cap: int, **options: Any):
    """Roots and outcome of `solve_stack`, each row written once."""
    values = torch.full_like(A, 7.0, dtype=options.get("value_dtype"))
    written = torch.zeros(len(A), dtype=torch.int32)

    def store(rows: slice, value: torch.Tensor, usable: torch.Tensor) -> None:
        values[rows] = torch.where(usable[:, None, None], value, values[rows])
        written[rows] += 1

    outcome = solve_stack(
        lambda rows: A[rows],
        store,
        num_matrices=len(A),
        size=A.shape[-1],
        root=root,
        config=row.config,
        epsilon=0.0,
        dtype=A.dtype,
        device=A.device,
        max_workspace_bytes=cap,
        **options,
    )
    assert bool((written == 1).all())
    return values, outcome


def test_the_table_holds_every_solver() -> None:
    assert {type(row.config) for row in SOLVERS} == set(REGISTRY)


@each_row
def test_a_stack_in_pieces_is_the_stack(row: Row) -> None:
    A = random_spd(11, 16, row.condition, torch.Generator().manual_seed(0)).float()
    A[4, 0, 0] = torch.nan
    for root in row.roots[:2]:
        whole = inverse_root(A, root, row.config, residual_threshold=0.3)
        for cap in (NO_CAP, 16 * 16 * 4 * 60, 1):
            values, outcome = solved(A, row, root, cap, residual_threshold=0.3)
            good = whole.is_usable
            assert torch.equal(values[good], whole.value[good])
            assert bool((values[~good] == 7.0).all())
            assert torch.equal(outcome.status, whole.status)
            assert outcome.status[4] == InverseRootStatus.NON_FINITE_INPUT
            result = outcome.result(values, A.dtype)
            assert torch.equal(result.iterations, whole.iterations)
            torch.testing.assert_close(result.damping, whole.damping, equal_nan=True)


@each_row
@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_cap_is_kept(row: Row, num_rows: int) -> None:
    """What the solver states as its workspace is what it takes, with the input that `load` makes."""
    size, count = 64, 12
    A = random_spd(count, size, row.condition, torch.Generator().manual_seed(0)).float()
    values = torch.empty_like(A)
    solver = REGISTRY[type(row.config)]
    for root in row.roots:
        check = row.config
        num_stacks = solver.workspace(check, config_root(root)) + 2
        cap = num_rows * num_stacks * size * size * 4

        def run() -> None:
            solve_stack(
                lambda rows: A[rows].clone(),
                lambda rows, value, usable: values[rows].copy_(value),
                num_matrices=count,
                size=size,
                root=root,  # noqa: B023
                config=row.config,
                epsilon=1e-9,
                dtype=A.dtype,
                device=A.device,
                max_workspace_bytes=cap,  # noqa: B023
                residual_threshold=0.3,
            )

        run()  # cached constants are made
        with Allocations() as allocations:
            run()
        # Numbers per matrix and the sketch, 4 rows of N, are beside the N×N stacks.
        slack = 0.4 * num_rows * size * size * 4
        assert allocations.peak <= cap + slack, f"{allocations.peak / cap * num_stacks:.2f} stacks"
        assert allocations.peak >= 0.4 * cap, "the workspace is not overstated without bound"


def config_root(root: float):
    from dash_shampoo.inverse_root.registry import as_root

    return as_root(root)


class Passes(TorchDispatchMode):
    """Operators that go over a whole stack, by name; products, views and allocations are none."""

    PRODUCTS = ("bmm", "baddbmm", "baddbmm_", "mm", "addmm", "_linalg_eigh")
    VIEWS = (
        "alias",
        "diagonal",
        "expand",
        "select",
        "slice",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    )
    ALLOCATIONS = ("empty", "new_empty", "empty_like")

    def __init__(self, numel: int) -> None:
        super().__init__()
        self._numel = numel
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [
            t for t in tree_leaves((args, kwargs or {}, result)) if isinstance(t, torch.Tensor)
        ]
        is_pass = name not in self.PRODUCTS + self.VIEWS + self.ALLOCATIONS
        if is_pass and max((t.numel() for t in tensors), default=0) >= self._numel:
            self.names.append(name)
        return result


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("num_squarings", [4, 9, 14])
def test_minimax_makes_four_passes_a_sum_of_its_rungs_and_three_after(
    threshold, num_squarings: int
) -> None:
    A = random_spd(8, 32, 1e4, torch.Generator().manual_seed(0)).float()
    values = torch.empty_like(A)
    config = MinimaxConfig(num_squarings=num_squarings, relative_epsilon=1e-4)

    def run() -> None:
        solve_stack(
            lambda rows: A[rows],
            lambda rows, value, usable: values[rows].copy_(value),
            num_matrices=8,
            size=32,
            root=2,
            config=config,
            epsilon=1e-12,
            dtype=A.dtype,
            device=A.device,
            max_workspace_bytes=NO_CAP,
            residual_threshold=threshold,
        )

    run()
    with Passes(A.numel()) as passes:
        run()
    # The sum is one pass on a device; on the CPU, in a cache, one for each rung.
    rungs = ["mul", *["add_"] * (num_squarings - 1)]
    solve = ["mul", "linalg_vector_norm", "mul_", "addcmul", *rungs]
    # Scaled and stored; the sketch of the residual sees values that are not finite.
    after = ["mul_", "copy_"] if threshold else ["mul_", "sum", "copy_"]
    assert passes.names == solve + after


@each_row
def test_no_solver_makes_many_passes_after_it(row: Row) -> None:
    """Scaling or symmetry, values that are not finite, and the write."""
    A = random_spd(8, 32, row.condition, torch.Generator().manual_seed(0)).float()
    solver = REGISTRY[type(row.config)]
    root = config_root(row.roots[0])
    with Passes(A.numel()) as inside:
        solver.solve(A, root, row.config, 0.0)
    values = torch.empty_like(A)
    with Passes(A.numel()) as passes:
        solve_stack(
            lambda rows: A[rows],
            lambda rows, value, usable: values[rows].copy_(value),
            num_matrices=8,
            size=32,
            root=root,
            config=row.config,
            epsilon=0.0,
            dtype=A.dtype,
            device=A.device,
            max_workspace_bytes=NO_CAP,
            residual_threshold=0.3,
        )
    after = passes.names[len(inside.names) :]
    assert passes.names[: len(inside.names)] == inside.names
    assert len(after) <= 3, after


def test_roots_that_overflow_in_the_narrower_dtype_are_not_usable() -> None:
    A = torch.stack((torch.eye(8), 1e-12 * torch.eye(8)))
    row = next(row for row in SOLVERS if row.name == "newton_db")
    values, outcome = solved(A, row, 2, NO_CAP, value_dtype=torch.float16)
    assert values.dtype == torch.float16
    assert outcome.status.tolist() == [
        InverseRootStatus.SUCCESS,
        InverseRootStatus.NON_FINITE_RESULT,
    ]
    assert bool((values[1] == 7.0).all())
    wide, outcome = solved(A, row, 2, NO_CAP, value_dtype=torch.bfloat16)
    assert wide.dtype == torch.bfloat16
    assert not outcome.status.any()


def test_an_empty_stack_is_loaded_never() -> None:
    def fail(*args: object) -> Any:
        raise AssertionError("nothing to load or store")

    for num_matrices, size in ((0, 4), (3, 0)):
        outcome = solve_stack(
            fail,
            fail,
            num_matrices=num_matrices,
            size=size,
            root=2,
            config=NewtonDBConfig(),
            epsilon=0.0,
            dtype=torch.float32,
            device=torch.device("cpu"),
            max_workspace_bytes=1,
        )
        result = outcome.result(torch.empty(num_matrices, size, size), torch.float32)
        assert result.status.shape == result.damping.shape == (num_matrices,)


def test_a_second_solver_takes_the_roots_that_the_first_can_not_do(caplog) -> None:
    config = NewtonDBConfig()
    assert config_for_root(config, 8) is config
    with caplog.at_level("WARNING", logger="dash_shampoo"):
        for _ in range(2):
            assert config_for_root(config, 6) == MinimaxConfig()
        second = MinimaxConfig(num_squarings=6)
        assert config_for_root(config, 3, second) is second
    assert len([r for r in caplog.records if "root=6" in r.getMessage()]) == 1
    with pytest.raises(ValueError, match=r"root=5 is not one of 2, 4, 8.*second solver.*root=5"):
        config_for_root(config, 5)
