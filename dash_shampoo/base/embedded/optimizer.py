"""The embedded DistributedShampoo: parameter groups, their lists of blocks, steps, checkpoints."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from dash_shampoo.base.embedded import configs, factories, group_state
from dash_shampoo.base.embedded.distributed_configs import (
    DefaultSingleDeviceDistributedConfig,
    DistributedConfig,
    not_implemented,
)
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.group_state import GroupState
from dash_shampoo.base.embedded.hyper_parameters import check_and_complete
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerList
from dash_shampoo.base.embedded.state import copy_nested, match_state, native_config
from dash_shampoo.base.embedded.step import ShampooStep

logger = logging.getLogger(__name__)

# What the state was built from; a loaded checkpoint does not change it.
_STRUCTURE = (
    "params",
    "param_names",
    "distributed_config",
    "preconditioner_config",
    "grafting_config",
)


class DistributedShampoo(ShampooStep, Optimizer):
    """Shampoo (arXiv 1802.09568, 2309.06497), block by block.

    The same constructor, options, state and arithmetic as Meta's Distributed Shampoo, for machines
    without that package; what is left out raises NotImplementedError.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate, ≥ 0. (Default: 1e-2)
        betas: Decay of the gradients' EMA, in [0, 1), and of the factor matrices, in [0, 1]; beta2 =
            1 sums instead. (Default: (0.9, 1.0))
        beta3: Decay used for the filtered gradient of the step itself; -1 means beta1. (Default: -1)
        epsilon: Damping of the factor matrices, positive. (Default: 1e-12)
        weight_decay: ≥ 0. (Default: 0)
        weight_decay_type: See WeightDecayType. (Default: DECOUPLED)
        max_preconditioner_dim: Largest dimension of a block, or math.inf. (Default: 1024)
        precondition_frequency: Steps between inverse roots. (Default: 1)
        start_preconditioning_step: First step with inverse roots; before, the grafting's direction is
            taken. -1 means precondition_frequency. (Default: -1)
        use_bias_correction: Whether the EMAs are divided by 1 - beta^step. (Default: True)
        iterate_averaging_config: Momentum or averaging. (Default: None)
        grafting_config: Whose norm the direction of a block gets. (Default: None)
        use_pin_memory: Whether the learning rate is staged in pinned memory. (Default: False)
        shampoo_pt2_compile_config: Compile the step with these arguments. (Default: None)
        distributed_config: How blocks are spread. (Default: SingleDeviceDistributedConfig())
        preconditioner_config: The preconditioner. (Default: RootInvShampooPreconditionerConfig())
        shampoo_runtime_config: Checks. (Default: ShampooRuntimeConfig())
        concurrency_config: Accepted; all groups share one stream. (Default: ConcurrencyConfig())

    Raises:
        NotImplementedError: If an option is not in the embedded base.
        ValueError: If a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 1.0),
        beta3: float = -1.0,
        epsilon: float = 1e-12,
        weight_decay: float = 0.0,
        weight_decay_type: configs.WeightDecayType = configs.WeightDecayType.DECOUPLED,
        max_preconditioner_dim: int | float = 1024,
        precondition_frequency: int = 1,
        start_preconditioning_step: int = -1,
        use_bias_correction: bool = True,
        iterate_averaging_config: configs.IterateAveragingConfig | None = None,
        grafting_config: configs.PreconditionerConfig | None = None,
        use_pin_memory: bool = False,
        shampoo_pt2_compile_config: configs.ShampooPT2CompileConfig | None = None,
        distributed_config: DistributedConfig = DefaultSingleDeviceDistributedConfig,
        preconditioner_config: configs.PreconditionerConfig = configs.DefaultShampooConfig,
        shampoo_runtime_config: configs.ShampooRuntimeConfig = configs.DefaultShampooRuntimeConfig,
        concurrency_config: configs.ConcurrencyConfig = configs.DefaultConcurrencyConfig,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "beta3": beta3,
                "epsilon": epsilon,
                "weight_decay": weight_decay,
                "peak_lr": lr,
                "weight_decay_type": weight_decay_type,
                "max_preconditioner_dim": max_preconditioner_dim,
                "precondition_frequency": precondition_frequency,
                "start_preconditioning_step": start_preconditioning_step,
                "use_bias_correction": use_bias_correction,
                "iterate_averaging_config": iterate_averaging_config,
                "grafting_config": grafting_config,
                "use_pin_memory": use_pin_memory,
                "distributed_config": distributed_config,
                "preconditioner_config": preconditioner_config,
            },
        )
        self._shampoo_pt2_compile_config = shampoo_pt2_compile_config
        self._runtime_config = shampoo_runtime_config
        del concurrency_config  # a matter of speed alone
        for group in self.param_groups:
            check_and_complete(group)
        self._per_group_state_lists: list[GroupState] = [{} for _ in self.param_groups]
        with torch.no_grad():
            # Group by group and in this order: it is the order of the keys in the state.
            for state_lists, group in self._groups():
                self._instantiate_distributor(state_lists, group)
                self._instantiate_preconditioners(state_lists, group)
                group_state.add_state(state_lists, group, self.state)
        if shampoo_pt2_compile_config is not None:
            self._compile_step(shampoo_pt2_compile_config)
        self.register_state_dict_post_hook(self._export_state)

    def _groups(self) -> Iterator[tuple[GroupState, dict[str, Any]]]:
        yield from zip(self._per_group_state_lists, self.param_groups, strict=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; possible only before the construction is complete.

        Raises:
            RuntimeError: Afterwards, as the blocks and their state exist already.
        """
        if hasattr(self, "_per_group_state_lists"):
            raise RuntimeError(
                "DistributedShampoo cannot take another parameter group after its construction: "
                "construct a new one with all groups and load the old one's state where it fits."
            )
        super().add_param_group(param_group)

    # ------------------------------------------------------------------------- construction

    def _select_distributor_class(self, distributed_config: DistributedConfig) -> type[Distributor]:
        """The distributor for a config; a point to override.

        Raises:
            NotImplementedError: If the embedded base has none.
        """
        distributor_class = factories.own_distributor_class(distributed_config)
        if distributor_class is None:
            raise not_implemented(f"distributed_config={distributed_config!r}")
        return distributor_class

    def _preconditioner_config_to_list_cls(
        self,
        state_lists: Any,
        group: dict[str, Any],
        preconditioner_config: configs.PreconditionerConfig | None,
    ) -> PreconditionerList | None:
        """The preconditioner list for a config, of Shampoo or of grafting; a point to override.

        Raises:
            NotImplementedError: If the embedded base has none.
        """
        return factories.preconditioner_list(
            preconditioner_config, self.state, state_lists["distributor"], group
        )

    def _instantiate_distributor(self, state_lists: GroupState, group: dict[str, Any]) -> None:
        distributor_class = self._select_distributor_class(group["distributed_config"])
        distributor = distributor_class(group, self._runtime_config)
        state_lists["distributor"] = distributor
        if not distributor.local_blocked_params:
            logger.warning(
                "This process owns no block of a parameter group and idles in its steps; a smaller "
                "num_trainers_per_group would avoid that."
            )
        state_lists["masked_blocked_params"] = distributor.local_blocked_params
        state_lists["previous_grad_selector"] = None
        for info in distributor.local_block_info_list:
            self.state[info.param][info.composable_block_ids[1]] = {}

    def _instantiate_preconditioners(self, state_lists: Any, group: dict[str, Any]) -> None:
        for kind, config in (("shampoo", "preconditioner_config"), ("grafting", "grafting_config")):
            preconditioners = self._preconditioner_config_to_list_cls(
                state_lists=state_lists, group=group, preconditioner_config=group[config]
            )
            # A list of a subclass has methods of its own, and checks them itself.
            if preconditioners is not None and type(preconditioners) in factories.CHECKED_LISTS:
                preconditioners.check_supported()
            state_lists[f"{kind}_preconditioner_list"] = preconditioners

    def _compile_step(self, config: configs.ShampooPT2CompileConfig) -> None:
        # The preconditioners stay out of the graphs: their lists change with the selection of
        # gradients, and their matmuls gain nothing.
        disable: Callable[..., Callable[..., Any]] = torch.compiler.disable
        for name in ("_update_preconditioners", "_precondition_and_grafting"):
            vars(self)[name] = disable(getattr(self, name))
        compiled = torch.compile(self._compute_search_directions, **asdict(config))
        vars(self)["_compute_search_directions"] = compiled

    # --------------------------------------------------------------------------------- steps

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters.

        Args:
            closure: Evaluates the model anew and returns the loss. (Default: None)

        Returns:
            The closure's loss.

        Raises:
            PreconditionerValueError: If a factor matrix or its inverse root is not finite.
            RuntimeError: If averaging is in eval mode.
            ValueError: If the inverse roots of a block failed too often in a row.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for state_lists, group in self._groups():
            self._group_step_body(state_lists, group)
        return loss

    def _group_step_body(self, state_lists: GroupState, group: dict[str, Any]) -> None:
        state_lists["masked_blocked_grads"] = state_lists["distributor"].merge_and_block_gradients()
        group_state.take_weights(state_lists)
        has_changed = group_state.mask_state_lists(state_lists)
        if has_changed and self._shampoo_pt2_compile_config is not None:
            logger.warning(
                "Other parameters than in the previous step have gradients: the step is compiled again."
            )
        step = int(state_lists["step"].add_(1).item())
        state_lists["lr_cpu_pinned"].fill_(group["lr"])
        state_lists["lr_tensor"].copy_(state_lists["lr_cpu_pinned"], non_blocking=True)
        group_state.set_interpolation_coefficients(
            state_lists, group["iterate_averaging_config"], is_step=True
        )
        directions: Sequence[Tensor] = ()
        if state_lists["masked_blocked_grads"]:
            try:
                directions = self._compute_search_directions(
                    state_lists=state_lists,
                    step=state_lists["step"],
                    lr=state_lists["lr_tensor"],
                    train_interp_coeff=state_lists["train_interp_coeff"],
                    eval_interp_coeff=state_lists["eval_interp_coeff"],
                    **group_state.step_arguments(group, step),
                )
            except Exception as error:
                # Where other processes wait for the directions of this one, they must hear of it.
                directions = state_lists["distributor"].substitute(error)
        state_lists["distributor"].update_params(directions)
        state_lists["masked_blocked_grads"] = None

    def train(self) -> None:
        """Puts the parameters to the training sequence Y; without averaging does nothing."""
        self._switch_mode(is_train=True)

    def eval(self) -> None:
        """Puts the parameters to the evaluation sequence X; without averaging does nothing."""
        self._switch_mode(is_train=False)

    @torch.no_grad()
    def _switch_mode(self, is_train: bool) -> None:
        for state_lists, group in self._groups():
            group_state.switch_mode(state_lists, group["iterate_averaging_config"], is_train)

    # --------------------------------------------------------------------------- checkpoints

    @staticmethod
    def _export_state(optimizer: Optimizer, state_dict: StateDict) -> None:
        """Copies the nested dicts and gives every parameter an entry, on every process."""
        state = state_dict["state"]
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        state_dict["state"] = {i: copy_nested(state[i]) if i in state else {} for i in ids}

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Copies a saved state into the state's tensors, or raises and changes nothing.

        Unlike torch's own, this does not cast the state to the parameters' dtypes on the way (fp32
        factor matrices of bf16 parameters keep their precision), keeps the state's tensors, and the
        train or eval mode of the optimizer is as before.

        Args:
            state_dict: As returned by `state_dict()`, of this base or of Meta's.

        Raises:
            ValueError: If groups, keys or shapes do not fit.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved_groups = state_dict["param_groups"]
        distributors = [lists["distributor"] for lists in self._per_group_state_lists]
        copies = match_state(
            self.param_groups, saved_groups, self.state, state_dict["state"], distributors
        )
        own_configs = vars(sys.modules[__package__])
        updates = [
            {k: native_config(v, own_configs) for k, v in saved.items() if k not in _STRUCTURE}
            for saved in saved_groups
        ]
        modes = [lists.get("train_mode", True) for lists in self._per_group_state_lists]
        is_train = all(map(bool, modes))
        for target, source in copies:
            target.copy_(source)
        for group, update in zip(self.param_groups, updates, strict=True):
            group.update(update)
        self._switch_mode(is_train)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
