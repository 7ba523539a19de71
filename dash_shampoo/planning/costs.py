"""Floating-point operations and bytes of one step of a group of blocks, phase by phase.

Numbers are per step: the inverse roots count by 1 / precondition_frequency. Bytes moved are the least
that the phase must read from and write to memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import compress
from typing import Any

import torch

from dash_shampoo.base import (
    BaseShampooPreconditionerConfig,
    EigendecomposedKLShampooPreconditionerConfig,
    EigendecomposedShampooPreconditionerConfig,
    EigenvalueCorrectedShampooPreconditionerConfig,
    RootInvConfig,
    RootInvKLShampooPreconditionerConfig,
    RootInvShampooPreconditionerConfig,
)
from dash_shampoo.planning.blocks import BlockCost, GroupProfile
from dash_shampoo.planning.devices import Device, precision_of
from dash_shampoo.planning.solver_cost import (
    SolverCost,
    eigenbasis_cost,
    measure_solver,
    orthogonalization_flops,
)

_KL = (RootInvKLShampooPreconditionerConfig, EigendecomposedKLShampooPreconditionerConfig)
FACTOR_KINDS = ("factor_matrices", "inv_factor_matrices", "factor_matrices_eigenvectors")


@dataclass(frozen=True)
class StepCost:
    """What one step costs a rank.

    Attributes:
        factor_update_flops: Matmul FLOPs of the outer products, F ← βF + w·GGᵀ.
        inverse_root_flops: Matmul FLOPs of the inverse roots, amortised.
        eigendecomposition_flops: FLOPs of eigendecompositions in the inverse roots, amortised, and of
            singular value decompositions; far from peak rates on a GPU.
        precondition_flops: Matmul FLOPs of G ×₁ R₁ ×₂ R₂ …, or of the orthogonalisation.
        factor_update_seconds: Roofline of the device, 0 if none was named; the same for the others.
        inverse_root_seconds: Of the inverse roots, with eigendecompositions at the peak rate.
        precondition_seconds: Of the preconditioning.
        elementwise_seconds: Of everything else: moments, grafting, weight decay, parameters.
        communication_seconds: Of the gathering of the updates.
    """

    factor_update_flops: float = 0.0
    inverse_root_flops: float = 0.0
    eigendecomposition_flops: float = 0.0
    precondition_flops: float = 0.0
    factor_update_seconds: float = 0.0
    inverse_root_seconds: float = 0.0
    precondition_seconds: float = 0.0
    elementwise_seconds: float = 0.0
    communication_seconds: float = 0.0

    @property
    def matmul_flops(self) -> float:
        """All matmul FLOPs of a step."""
        return self.factor_update_flops + self.inverse_root_flops + self.precondition_flops

    @property
    def seconds(self) -> float:
        """The roofline of the step: the sum over its phases."""
        names = [f.name for f in fields(self) if f.name.endswith("_seconds")]
        return float(sum(getattr(self, name) for name in names))

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(*sums_of_fields(self, other))


def sums_of_fields(one: Any, other: Any) -> list[Any]:
    """The sums of the fields of two dataclasses of one type; of dicts key by key."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return [dict(Counter(a) + Counter(b)) if isinstance(a, dict) else a + b for a, b in pairs]


class GroupCost:
    """The cost of blocks of a parameter group.

    Args:
        profile: The group's settings.
        device: For the roofline; None leaves the seconds at 0.
        use_tf32: Whether the matmuls outside the inverse roots use TF32 for float32.
    """

    def __init__(self, profile: GroupProfile, device: Device | None, use_tf32: bool) -> None:
        self._device = device
        self._use_tf32 = use_tf32
        self.precondition_frequency: int = profile.options["precondition_frequency"]
        # Without factor matrices the defaults are never used.
        config = profile.shampoo or RootInvShampooPreconditionerConfig()
        solver: Any = config.amortized_computation_config
        safety = getattr(config, "safety", None)
        compute_dtype = torch.promote_types(config.factor_matrix_dtype, torch.float32)
        self._inverse_dtype, self._num_passes = _application(config)
        # KL-Shampoo takes outer products of gradients preconditioned in all other dimensions.
        self._is_kl = isinstance(config, _KL)
        self._orthogonalization = getattr(
            profile.options["preconditioner_config"], "orthogonalization_config", None
        )
        self._compute_itemsize = compute_dtype.itemsize
        precision = str(getattr(solver, "matmul_precision", "fp32"))
        if precision == "auto":  # the most exact that it may be
            precision = "fp16x3"
        self._solver_precision = precision_of(compute_dtype) if precision == "fp32" else precision
        self.solver_cost: Callable[[float], SolverCost] = cache(
            lambda root: (
                measure_solver(
                    solver,
                    root,
                    profile.options["epsilon"],
                    compute_dtype,
                    None if safety is None else safety.residual_threshold,
                )
                if isinstance(solver, RootInvConfig)
                else eigenbasis_cost(solver)
            )
        )
        self.of_block: Callable[[BlockCost], StepCost] = cache(self._of_block)

    def _of_block(self, block: BlockCost) -> StepCost:
        spec = block.spec
        state = dict(block.state_bytes)
        numel = math.prod(spec.shape)
        grad_bytes = numel * spec.dtype.itemsize
        frequency = self.precondition_frequency
        sizes = list(compress(spec.shape, spec.selector))
        solves = [(self.solver_cost(root), n) for n, root in zip(sizes, spec.roots, strict=True)]
        factor_bytes = state.get("factor_matrices", 0)
        inverse_bytes = sum(state.get(kind, 0) for kind in FACTOR_KINDS[1:])

        # G₍ₖ₎G₍ₖ₎ᵀ of an N×M unfolding is 2N²M, and so is each mode product; N·M is the block.
        outer = sum(2.0 * size * numel for size in sizes)
        mode = self._num_passes * outer
        if self._is_kl:
            outer += max(len(sizes) - 1, 0) * mode
        root_flops = sum(cost.matmul_flops(n) for cost, n in solves) / frequency
        eigh_flops = sum(cost.eigendecomposition_flops(n) for cost, n in solves) / frequency
        moved = self._compute_itemsize * sum(cost.elements_moved(n) for cost, n in solves)
        moved += factor_bytes + inverse_bytes
        if self._orthogonalization is not None:
            mode, eigh_flops = orthogonalization_flops(self._orthogonalization, *spec.shape)
        flops = StepCost(
            factor_update_flops=outer,
            inverse_root_flops=root_flops,
            eigendecomposition_flops=eigh_flops,
            precondition_flops=mode,
        )
        if self._device is None:
            return flops
        phases = {
            "factor_update_seconds": (
                outer,
                len(sizes) * grad_bytes + 2 * factor_bytes,
                precision_of(spec.dtype, self._use_tf32),
            ),
            "inverse_root_seconds": (
                root_flops + eigh_flops,
                moved / frequency,
                self._solver_precision,
            ),
            "precondition_seconds": (
                mode,
                2 * len(sizes) * numel * self._inverse_dtype.itemsize + inverse_bytes,
                precision_of(self._inverse_dtype, self._use_tf32),
            ),
        }
        seconds = {phase: self._device.matmul_seconds(*work) for phase, work in phases.items()}
        # The state is read and written; the gradient and the direction are read.
        others = sum(size for kind, size in block.state_bytes if kind not in FACTOR_KINDS)
        elementwise = (2 * others + 2 * grad_bytes) / self._device.memory_bandwidth
        return replace(flops, elementwise_seconds=elementwise, **seconds)


def _application(config: BaseShampooPreconditionerConfig) -> tuple[torch.dtype, int]:
    """The dtype in which a gradient is preconditioned, and by how many matrices in each dimension."""
    if isinstance(config, EigenvalueCorrectedShampooPreconditionerConfig):
        # The gradient and its average into the basis, the direction out of it.
        return config.factor_matrix_eigenvectors_dtype, 3
    if isinstance(config, EigendecomposedShampooPreconditionerConfig):
        return config.factor_matrix_eigenvectors_dtype, 2
    assert isinstance(config, RootInvShampooPreconditionerConfig)
    return config.inv_factor_matrix_dtype, 1
