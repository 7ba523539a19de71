"""DashShampoo: Distributed Shampoo whose inverse roots and matmuls are computed on stacks of blocks."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any, cast

from torch import Tensor

from dash_shampoo.base import (
    DISTRIBUTOR,
    SHAMPOO_PRECONDITIONER_LIST,
    CoupledHigherOrderConfig,
    CoupledNewtonConfig,
    EigenConfig,
    PreconditionerConfig,
    RootInvKLShampooPreconditionerConfig,
    RootInvShampooPreconditionerConfig,
    RootInvShampooPreconditionerList,
)
from dash_shampoo.base import name as base_name
from dash_shampoo.config import DashShampooPreconditionerConfig
from dash_shampoo.distribution import ManyProcesses, shares_errors
from dash_shampoo.guards import GuardedShampoo
from dash_shampoo.preconditioner import (
    StackedRootInvKLShampooPreconditionerList,
    StackedRootInvShampooPreconditionerList,
    missing_seam,
)

logger = logging.getLogger(__name__)

_TESTED_COMMIT = "f606606"

# By exact type: the KL config is a subclass of the plain one, but another method.
_STACKED_LISTS: dict[type, type[StackedRootInvShampooPreconditionerList]] = {
    RootInvShampooPreconditionerConfig: StackedRootInvShampooPreconditionerList,
    DashShampooPreconditionerConfig: StackedRootInvShampooPreconditionerList,
    RootInvKLShampooPreconditionerConfig: StackedRootInvKLShampooPreconditionerList,
}
_SOLVERS_OF_BASE = (EigenConfig, CoupledNewtonConfig, CoupledHigherOrderConfig)


class DashShampoo(GuardedShampoo, ManyProcesses):
    """Distributed Shampoo, with all blocks of a size computed at once.

    A drop-in replacement for `DistributedShampoo`: the same constructor, parameter-group options, state
    and, with the same solver, the same results to round-off. What changes is the speed: gradients of
    equal shape are stacked, so that factor matrices, inverse roots and preconditioned gradients are
    batched matmuls (DASH, arXiv 2602.02016), and what becomes possible is the choice of a solver:

        preconditioner_config=RootInvShampooPreconditionerConfig(
            amortized_computation_config=NewtonDBConfig()
        )

    Accepts every argument of the base's `DistributedShampoo`; see there. `preconditioner_config` may
    also be a `DashShampooPreconditionerConfig`, with options of the stacked computation. Preconditioners
    that are not inverse roots (SOAP and others of Meta's package) run on the base's own list.

    Raises:
        ValueError: If a hyper-parameter is out of range, or the solver is unknown or cannot compute a
            root that the preconditioner config asks for.

    References:
        arXiv 2309.06497 (Distributed Shampoo); arXiv 2602.02016 (DASH).

    Example:
        >>> import torch
        >>> import dash_shampoo as ds
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = ds.DashShampoo(
        ...     model.parameters(), lr=0.01, grafting_config=ds.AdamPreconditionerConfig()
        ... )
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
    """

    @shares_errors
    def _compute_search_directions(self, **kwargs: Any) -> tuple[Tensor, ...]:
        return super()._compute_search_directions(**kwargs)

    def _preconditioner_config_to_list_cls(
        self,
        state_lists: dict[str, Any],
        group: dict[str, Any],
        preconditioner_config: PreconditionerConfig | None,
    ) -> Any:
        """The preconditioner list of a group: stacked for inverse roots, else the base's own."""
        stacked_list = _STACKED_LISTS.get(type(preconditioner_config))
        if stacked_list is None:
            if preconditioner_config is group["preconditioner_config"]:
                logger.info(
                    "%s is not computed by inverse roots: it runs on the base's own list, block by "
                    "block.",
                    type(preconditioner_config).__name__,
                )
            return super()._preconditioner_config_to_list_cls(
                state_lists, group, preconditioner_config
            )

        assert isinstance(preconditioner_config, RootInvShampooPreconditionerConfig)
        solver = preconditioner_config.amortized_computation_config
        # The base swallows an unknown solver as a failed computation, so it must be refused here.
        stacked_list.check_solver(solver)
        base_list = cast(
            RootInvShampooPreconditionerList,
            super()._preconditioner_config_to_list_cls(
                state_lists, group, _config_for_base(preconditioner_config)
            ),
        )
        if seam := missing_seam(base_list):
            return _fall_back(base_list, seam, solver)
        distributor = state_lists[DISTRIBUTOR]
        return stacked_list.adopt(
            base_list,
            block_list=distributor.local_blocked_params,
            block_names=self._block_names(distributor.local_block_info_list),
            options=_with_options(preconditioner_config),
            is_compiled=self._shampoo_pt2_compile_config is not None,
        )

    def _block_names(self, block_infos: tuple[Any, ...]) -> list[str]:
        """The name of each block's parameter, or its number in the state dict if names are not given."""
        # Looked up by identity: under FSDP2 the block's own index skips empty local shards.
        names: dict[int, str] = {}
        for group in self.param_groups:
            given = group.get("param_names", ())
            # Meta's package may split a group, and leaves each part the names of all.
            is_named = len(given) == len(group["params"])
            for index, param in enumerate(group["params"]):
                names[id(param)] = given[index] if is_named else f"parameter {len(names)}"
        return [names[id(info.param)] for info in block_infos]

    def failure_counts(self) -> dict[str, int]:
        """How many inverse roots were not accepted since the start, by the name of their parameter.

        Reads the outcomes from the device: one host synchronisation per parameter group. Parameters have
        names where the optimizer was given `model.named_parameters()`.

        Returns:
            Counts of this rank's blocks; parameters without a failure are absent.
        """
        counts: dict[str, int] = {}
        for state_lists in self._per_group_state_lists:
            preconditioners = state_lists[SHAMPOO_PRECONDITIONER_LIST]
            if isinstance(preconditioners, StackedRootInvShampooPreconditionerList):
                for name, count in preconditioners.failure_counts().items():
                    counts[name] = counts.get(name, 0) + count
        return counts


def _config_for_base(
    config: RootInvShampooPreconditionerConfig,
) -> RootInvShampooPreconditionerConfig:
    """The config without our options; the base looks its lists up by exact type."""
    if type(config) is not DashShampooPreconditionerConfig:
        return config
    return RootInvShampooPreconditionerConfig(
        **{f.name: getattr(config, f.name) for f in fields(RootInvShampooPreconditionerConfig)}
    )


def _with_options(config: RootInvShampooPreconditionerConfig) -> DashShampooPreconditionerConfig:
    """The config with the options of the stacked computation, at their defaults if it has none."""
    if isinstance(config, DashShampooPreconditionerConfig):
        return config
    return DashShampooPreconditionerConfig(
        **{f.name: getattr(config, f.name) for f in fields(RootInvShampooPreconditionerConfig)}
    )


def _fall_back(
    base_list: RootInvShampooPreconditionerList, seam: str, solver: object
) -> RootInvShampooPreconditionerList:
    explanation = (
        f"This version of Distributed Shampoo (base {base_name!r}) lacks {seam}, which DashShampoo was "
        f"tested with at commit {_TESTED_COMMIT} of facebookresearch/optimizers."
    )
    if type(solver) not in _SOLVERS_OF_BASE:
        raise RuntimeError(
            f"{explanation} The base itself cannot compute amortized_computation_config="
            f"{type(solver).__name__}; use that commit, or set DASH_SHAMPOO_BASE=embedded."
        )
    logger.warning("%s It runs on the base's own list, block by block.", explanation)
    return base_list
