"""DashShampoo: Distributed Shampoo whose inverse roots and matmuls are computed on stacks of blocks."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dash_shampoo.base import (
    DISTRIBUTOR,
    ROW_PARTS,
    SHAMPOO_PRECONDITIONER_LIST,
    Distributor,
    PreconditionerConfig,
)
from dash_shampoo.captured import CapturedStep, check_capturable
from dash_shampoo.config import gradient_policies
from dash_shampoo.consolidation import ConsolidatingShampoo
from dash_shampoo.diagnostics import HISTORY, BlockDiagnostics, diagnose, observe
from dash_shampoo.distribution import share_late_error, shares_errors
from dash_shampoo.gradients import settle_together
from dash_shampoo.planning import (
    Device,
    OptimizerPlan,
    Parallelism,
    parallelism_of,
    plan_optimizer,
)
from dash_shampoo.preconditioners import ScalarAdaGradPreconditionerConfig
from dash_shampoo.preconditioners.choice import preconditioner_list
from dash_shampoo.preconditioners.scalar import scalar_list
from dash_shampoo.preconditioners.seams import explanation_of
from dash_shampoo.preconditioners.stacked import StackedPreconditionerList, leave_out_of_graphs
from dash_shampoo.step import BUCKETS, STEP, BucketLists, BucketStep, missing_step_seam

logger = logging.getLogger(__name__)


class DashShampoo(ConsolidatingShampoo):
    """Distributed Shampoo, with all blocks of a size computed at once.

    A drop-in replacement for `DistributedShampoo`: the same constructor, parameter-group options, state
    and, with the same solver, the same results to round-off. What changes is the speed: gradients of
    equal shape are stacked, so that factor matrices, inverse roots and preconditioned gradients are
    batched matmuls (DASH, arXiv 2602.02016), and what becomes possible is the choice of a solver:

        preconditioner_config=RootInvShampooPreconditionerConfig(
            amortized_computation_config=NewtonDBConfig()
        )

    Accepts every argument of the base's `DistributedShampoo`; see there. `preconditioner_config` may
    also be a `DashShampooPreconditionerConfig`, with options of the stacked computation. All of the
    base's preconditioners are stacked: Shampoo by inverse roots or eigendecompositions, KL-Shampoo,
    eigenvalue-corrected Shampoo (SOAP), spectral and sign descent. One that is not known, of a future
    release, runs on the base's own list.

    Args:
        *args: As of the base's `DistributedShampoo`.
        capturable: Whether a group's step is put into CUDA graphs by the optimizer itself, between its
            gathered gradients and its directions: one graph for each kind of step (with and without a
            refresh, each selection of gradients, each set of options), recorded at the second step of
            the kind and replayed from then on. Steps that wait for the device by nature (eigh, QR, solvers
            that look for convergence) stay as they are. Results are the same up to the round-off of the
            bias corrections, which are then computed on the device. It has been tested with a
            stand-in for CUDA graphs on the CPU, and has never run on a GPU. (Default: False)
        **kwargs: As of the base's class.

    Raises:
        ValueError: If a hyper-parameter is out of range, the solver is unknown or cannot compute a
            root that the preconditioner config asks for, or no step of a group can be captured.

    References:
        arXiv 2309.06497 (Distributed Shampoo); arXiv 2602.02016 (DASH).

    Examples:
        >>> import torch
        >>> import dash_shampoo as ds
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = ds.DashShampoo(
        ...     model.parameters(), lr=0.01, grafting_config=ds.AdamPreconditionerConfig()
        ... )
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
    """

    __signature__ = ConsolidatingShampoo.__signature__.replace(
        parameters=[
            *ConsolidatingShampoo.__signature__.parameters.values(),
            inspect.Parameter("capturable", inspect.Parameter.KEYWORD_ONLY, default=False),
        ]
    )
    # Of inverse roots and of gradients, from before the base was last constructed anew.
    _earlier_failures: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {})
    collects_diagnostics = False
    """Whether steps note what `diagnostics` tells of them; no step waits for that. (Default: False)"""

    def __init__(
        self, params: ParamsT, *args: Any, capturable: bool = False, **kwargs: Any
    ) -> None:
        if not isinstance(capturable, bool):
            raise TypeError(f"Invalid capturable={capturable!r}: must be True or False.")
        self._capturable = capturable
        super().__init__(params, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_capturable": self._capturable}

    @torch.no_grad()
    def _finish_construction(self) -> None:
        """Lays the state of every group whose lists allow it into buckets."""
        seam = missing_step_seam()
        if self._capturable and seam:
            raise ValueError(f"capturable=True needs {seam}: {explanation_of(seam)}")
        if seam:
            logger.warning("%s It computes its steps block by block.", explanation_of(seam))
            return
        is_compiled = self._shampoo_pt2_compile_config is not None
        if is_compiled:
            leave_out_of_graphs(self, "_observe")
        groups = self.param_groups
        policies = gradient_policies([group["preconditioner_config"] for group in groups])
        step_class = CapturedStep if self._capturable else BucketStep
        for state_lists, group, policy in zip(
            self._lists_of_groups(), groups, policies, strict=True
        ):
            can_serve = BucketStep.can_serve(state_lists)
            if self._capturable:
                check_capturable(group, policy, is_compiled, can_serve)
            if can_serve:
                names = self._block_names(state_lists[DISTRIBUTOR].local_block_info_list)
                state_lists[BUCKETS] = step_class(state_lists, group, names, policy, is_compiled)

    def _reconstruct(self, steps: Mapping[Tensor, int], what: str) -> None:
        # The books are the lists', which are built anew.
        roots, gradients = self.failure_counts(), self.gradient_failure_counts()
        super()._reconstruct(steps, what)
        self._earlier_failures = roots, gradients

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters; as the base's.

        Args:
            closure: Evaluates the model anew and returns the loss. (Default: None)

        Returns:
            The closure's loss.

        Raises:
            PreconditionerValueError: If a gradient, a factor matrix or an inverse root is not finite and
                no safety config says otherwise. No state holds a value that is not finite then.
            ValueError: If the inverse roots of a block failed too often in a row.
        """
        loss = super().step(closure)
        error = None
        try:
            self._settle()
        except Exception as settled:
            error = settled
        share_late_error(self._per_group_state_lists, error)
        return loss

    def _settle(self) -> None:
        """Reads for all groups at once, after a refresh, what an accelerator has not told yet."""
        waiting = [lists for lists in self._stacked_lists() if lists.waits_for_settlement]
        if waiting or any(
            lists[BUCKETS].is_time_to_look(int(lists[STEP]))
            for lists in self._lists_of_groups()
            if BUCKETS in lists
        ):
            guards = [step.gradient_guard for step in self._bucket_steps()]
            settle_together([lists.ledger for lists in waiting], guards)
            for lists in waiting:
                lists.settle()

    def _lists_of_groups(self) -> list[dict[str, Any]]:
        return cast(list[dict[str, Any]], self._per_group_state_lists)

    def _stacked_lists(self) -> Iterator[StackedPreconditionerList]:
        for state_lists in self._lists_of_groups():
            preconditioners = state_lists[SHAMPOO_PRECONDITIONER_LIST]
            if isinstance(preconditioners, StackedPreconditionerList):
                yield preconditioners

    def _bucket_steps(self) -> Iterator[BucketStep]:
        for state_lists in self._lists_of_groups():
            if BUCKETS in state_lists:
                yield state_lists[BUCKETS]

    def _check_gradients(self) -> None:
        if len(self._per_group_state_lists) > 1:
            for buckets in self._bucket_steps():
                buckets.check_gradients()

    def _has_refused_gradients(self, state_lists: dict[str, Any]) -> bool:
        return BUCKETS in state_lists and state_lists[BUCKETS].has_refused_gradients

    @shares_errors
    def _compute_search_directions(
        self, state_lists: dict[str, Any], **settings: Any
    ) -> Sequence[Tensor]:
        """The base's step on bucket tensors; block by block where a group's lists need that."""
        buckets: BucketStep | None = state_lists.get(BUCKETS)
        if buckets is None:
            return super()._compute_search_directions(state_lists=state_lists, **settings)
        if self.collects_diagnostics or HISTORY in state_lists:
            self._observe(state_lists)
        compute = super()._compute_search_directions
        if isinstance(buckets, CapturedStep):
            captured = buckets.search(state_lists, settings, compute)
            if captured is not None:
                return captured
        on_buckets = buckets.on_buckets(state_lists)
        if on_buckets is None:
            return buckets.nothing(state_lists)
        directions = compute(state_lists=on_buckets, **settings)
        return buckets.to_blocks(directions)

    @torch.no_grad()
    def _precondition_and_grafting(
        self, state_lists: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """The base's; on bucket tensors with the norms of every slot."""
        if isinstance(state_lists, BucketLists):
            buckets: BucketStep = state_lists[BUCKETS]
            return buckets.directions(state_lists, *args, **kwargs)
        return super()._precondition_and_grafting(state_lists, *args, **kwargs)

    def _observe(self, state_lists: dict[str, Any]) -> None:
        observe(state_lists, self.collects_diagnostics)

    def _preconditioner_config_to_list_cls(
        self,
        state_lists: dict[str, Any],
        group: dict[str, Any],
        preconditioner_config: PreconditionerConfig | None,
    ) -> Any:
        """The preconditioner list of a group: stacked where the config is known, else the base's own."""
        distributor = state_lists[DISTRIBUTOR]
        if group.get(ROW_PARTS) is not None and not isinstance(distributor, Distributor):
            raise ValueError(
                f"Invalid {ROW_PARTS}={group[ROW_PARTS]!r}: {type(group['distributed_config']).__name__} "
                "can't cut parameters into parts of rows."
            )
        if isinstance(preconditioner_config, ScalarAdaGradPreconditionerConfig):
            return scalar_list(preconditioner_config, self.state, distributor)
        return preconditioner_list(
            preconditioner_config,
            group,
            partial(super()._preconditioner_config_to_list_cls, state_lists, group),
            block_list=distributor.local_blocked_params,
            block_names=self._block_names(distributor.local_block_info_list),
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

    def plan(
        self,
        parallelism: Parallelism | None = None,
        device: Device | None = None,
        use_tf32: bool = False,
    ) -> OptimizerPlan:
        """Memory, work and balance of this optimizer, on its own ranks or on others.

        Args:
            parallelism: How many ranks there are and what they share. Default: as it is now.
            device: Where the roofline is taken; `planning.DEVICES` has some. Default: none.
            use_tf32: Whether float32 matmuls outside the inverse roots use TF32. Default: False.

        Returns:
            The plan; see `plan_optimizer`.
        """
        groups = [
            {**group, "params": [p for p in group["params"] if p.requires_grad]}
            for group in self.param_groups
        ]
        groups = [group for group in groups if group["params"]]
        if parallelism is None:
            parallelism = parallelism_of(groups[0]["distributed_config"])
        return plan_optimizer(groups, parallelism, device, use_tf32)

    def diagnostics(self) -> list[BlockDiagnostics]:
        """Condition, residual, norms, failures and relative updates of this rank's blocks, computed now.

        `update_to_weight` and `steps_since_good_root` need `collects_diagnostics` in the steps before.
        """
        return [
            block
            for lists in self._lists_of_groups()
            for block in diagnose(
                lists, self._block_names(lists[DISTRIBUTOR].local_block_info_list)
            )
        ]

    def failure_counts(self) -> dict[str, int]:
        """How many inverse roots were not accepted since the start, by the name of their parameter.

        Reads outcomes from the device where they have not arrived, and changes nothing. Parameters have
        names where the optimizer was given `model.named_parameters()`.

        Returns:
            Counts of this rank's blocks; parameters without a failure are absent.
        """
        counts = [lists.ledger.counts() for lists in self._stacked_lists()]
        return _sum(self._earlier_failures[0], *counts)

    def gradient_failure_counts(self) -> dict[str, int]:
        """How many gradients of blocks were not finite since the start, by the name of their parameter.

        Reads the counts from the device.

        Returns:
            Counts of this rank's blocks; parameters without such a gradient are absent.
        """
        counts = [step.gradient_guard.counts() for step in self._bucket_steps()]
        return _sum(self._earlier_failures[1], *counts)


def _sum(*counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter()))
