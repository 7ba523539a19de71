"""The embedded DistributedShampoo: parameter groups, their lists of blocks, steps, checkpoints."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from dash_shampoo.base.embedded import (
    configs,
    distributed_configs,
    factories,
    keys,
    matrix_function_configs,
)
from dash_shampoo.base.embedded.configs import (
    ConcurrencyConfig,
    DefaultConcurrencyConfig,
    DefaultShampooConfig,
    DefaultShampooRuntimeConfig,
    IterateAveragingConfig,
    PreconditionerConfig,
    ShampooPT2CompileConfig,
    ShampooRuntimeConfig,
    WeightDecayType,
)
from dash_shampoo.base.embedded.distributed_configs import (
    DefaultSingleDeviceDistributedConfig,
    DistributedConfig,
    not_implemented,
)
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.group_state import (
    GroupState,
    add_buffers,
    add_scalars,
    is_averaging,
    mask_state_lists,
    set_interpolation_coefficients,
    step_arguments,
    switch_mode,
    take_weights,
)
from dash_shampoo.base.embedded.hyper_parameters import check_and_complete
from dash_shampoo.base.embedded.preconditioner_list import (
    PreconditionerList,
)
from dash_shampoo.base.embedded.state import copy_nested, match_state, native_config, pair_params
from dash_shampoo.base.embedded.step import ShampooStep

logger = logging.getLogger(__name__)

# What the state was built from; a loaded checkpoint does not change it.
_STRUCTURE = (
    keys.PARAMS,
    "param_names",
    keys.DISTRIBUTED_CONFIG,
    keys.PRECONDITIONER_CONFIG,
    keys.GRAFTING_CONFIG,
)
_NATIVE_CONFIGS = {**vars(matrix_function_configs), **vars(distributed_configs), **vars(configs)}


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
        weight_decay_type: WeightDecayType = WeightDecayType.DECOUPLED,
        max_preconditioner_dim: int | float = 1024,
        precondition_frequency: int = 1,
        start_preconditioning_step: int = -1,
        use_bias_correction: bool = True,
        iterate_averaging_config: IterateAveragingConfig | None = None,
        grafting_config: PreconditionerConfig | None = None,
        use_pin_memory: bool = False,
        shampoo_pt2_compile_config: ShampooPT2CompileConfig | None = None,
        distributed_config: DistributedConfig = DefaultSingleDeviceDistributedConfig,
        preconditioner_config: PreconditionerConfig = DefaultShampooConfig,
        shampoo_runtime_config: ShampooRuntimeConfig = DefaultShampooRuntimeConfig,
        concurrency_config: ConcurrencyConfig = DefaultConcurrencyConfig,
    ) -> None:
        super().__init__(
            params,
            {
                keys.LR: lr,
                keys.BETAS: betas,
                keys.BETA3: beta3,
                keys.EPSILON: epsilon,
                keys.WEIGHT_DECAY: weight_decay,
                keys.PEAK_LR: lr,
                keys.WEIGHT_DECAY_TYPE: weight_decay_type,
                keys.MAX_PRECONDITIONER_DIM: max_preconditioner_dim,
                keys.PRECONDITION_FREQUENCY: precondition_frequency,
                keys.START_PRECONDITIONING_STEP: start_preconditioning_step,
                keys.USE_BIAS_CORRECTION: use_bias_correction,
                keys.ITERATE_AVERAGING_CONFIG: iterate_averaging_config,
                keys.GRAFTING_CONFIG: grafting_config,
                keys.USE_PIN_MEMORY: use_pin_memory,
                keys.DISTRIBUTED_CONFIG: distributed_config,
                keys.PRECONDITIONER_CONFIG: preconditioner_config,
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
                add_scalars(state_lists, group, self.state)
                add_buffers(state_lists, group, self.state)
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
            raise not_implemented(f"{keys.DISTRIBUTED_CONFIG}={distributed_config!r}")
        return distributor_class

    def _preconditioner_config_to_list_cls(
        self,
        state_lists: Any,
        group: dict[str, Any],
        preconditioner_config: PreconditionerConfig | None,
    ) -> PreconditionerList | None:
        """The preconditioner list for a config, of Shampoo or of grafting; a point to override.

        Raises:
            NotImplementedError: If the embedded base has none.
        """
        return factories.preconditioner_list(
            preconditioner_config, self.state, state_lists[keys.DISTRIBUTOR], group
        )

    def _instantiate_distributor(self, state_lists: GroupState, group: dict[str, Any]) -> None:
        distributor_class = self._select_distributor_class(group[keys.DISTRIBUTED_CONFIG])
        distributor = distributor_class(group, self._runtime_config)
        state_lists[keys.DISTRIBUTOR] = distributor
        if not distributor.local_blocked_params:
            logger.warning(
                "This process owns no block of a parameter group and idles in its steps; a smaller "
                "num_trainers_per_group would avoid that."
            )
        state_lists[keys.MASKED_BLOCKED_PARAMS] = distributor.local_blocked_params
        state_lists[keys.PREVIOUS_GRAD_SELECTOR] = None
        for info in distributor.local_block_info_list:
            self.state[info.param][info.composable_block_ids[1]] = {}

    def _instantiate_preconditioners(self, state_lists: GroupState, group: dict[str, Any]) -> None:
        if group[keys.PRECONDITIONER_CONFIG] is None:
            raise ValueError(f"Invalid {keys.PRECONDITIONER_CONFIG}=None: must be a config.")
        shampoo, grafting = (
            self._preconditioner_config_to_list_cls(
                state_lists=state_lists, group=group, preconditioner_config=group[key]
            )
            for key in (keys.PRECONDITIONER_CONFIG, keys.GRAFTING_CONFIG)
        )
        for preconditioners in (shampoo, grafting):
            # A list of a subclass has methods of its own, and checks them itself.
            if preconditioners is not None and type(preconditioners) in factories.CHECKED_LISTS:
                preconditioners.check_supported()
        assert shampoo is not None
        state_lists[keys.SHAMPOO_PRECONDITIONER_LIST] = shampoo
        state_lists[keys.GRAFTING_PRECONDITIONER_LIST] = grafting

    def _compile_step(self, config: ShampooPT2CompileConfig) -> None:
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
        state_lists[keys.MASKED_BLOCKED_GRADS] = state_lists[
            keys.DISTRIBUTOR
        ].merge_and_block_gradients()
        take_weights(state_lists)
        has_changed = mask_state_lists(state_lists)
        if has_changed and self._shampoo_pt2_compile_config is not None:
            logger.warning(
                "Other parameters than in the previous step have gradients: the step is compiled "
                "again."
            )
        step = int(state_lists[keys.STEP].add_(1).item())
        state_lists[keys.LR_CPU_PINNED].fill_(group[keys.LR])
        state_lists[keys.LR_TENSOR].copy_(state_lists[keys.LR_CPU_PINNED], non_blocking=True)
        set_interpolation_coefficients(
            state_lists, group[keys.ITERATE_AVERAGING_CONFIG], is_step=True
        )
        directions: Sequence[Tensor] = ()
        if state_lists[keys.MASKED_BLOCKED_GRADS]:
            try:
                directions = self._compute_search_directions(
                    state_lists=state_lists,
                    step=state_lists[keys.STEP],
                    lr=state_lists[keys.LR_TENSOR],
                    train_interp_coeff=state_lists[keys.TRAIN_INTERP_COEFF],
                    eval_interp_coeff=state_lists[keys.EVAL_INTERP_COEFF],
                    **step_arguments(group, step),
                )
            except Exception as error:
                # Where other processes wait for the directions of this one, they must hear of it.
                directions = state_lists[keys.DISTRIBUTOR].substitute(error)
        state_lists[keys.DISTRIBUTOR].update_params(directions)
        state_lists[keys.MASKED_BLOCKED_GRADS] = None

    def train(self) -> None:
        """Puts the parameters to the training sequence Y; without averaging does nothing."""
        self._switch_mode(is_train=True)

    def eval(self) -> None:
        """Puts the parameters to the evaluation sequence X; without averaging does nothing."""
        self._switch_mode(is_train=False)

    @torch.no_grad()
    def _switch_mode(self, is_train: bool) -> None:
        for state_lists, group in self._groups():
            averaging = group[keys.ITERATE_AVERAGING_CONFIG]
            if is_averaging(averaging) and bool(state_lists[keys.TRAIN_MODE]) != is_train:
                switch_mode(state_lists, averaging, is_train)

    # --------------------------------------------------------------------------- checkpoints

    @staticmethod
    def _export_state(optimizer: Optimizer, state_dict: StateDict) -> None:
        """Copies the nested dicts and gives every parameter an entry, on every process."""
        state = state_dict["state"]
        ids = chain.from_iterable(group[keys.PARAMS] for group in state_dict["param_groups"])
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
        pairs = pair_params(self.param_groups, saved_groups)
        distributors = [lists[keys.DISTRIBUTOR] for lists in self._per_group_state_lists]
        copies = match_state(pairs, self.state, state_dict["state"], distributors)
        updates = [
            {k: native_config(v, _NATIVE_CONFIGS) for k, v in saved.items() if k not in _STRUCTURE}
            for saved in saved_groups
        ]

        modes = [lists.get(keys.TRAIN_MODE, True) for lists in self._per_group_state_lists]
        is_train = all(map(bool, modes))
        for target, source in copies:
            target.copy_(source)
        for group, update in zip(self.param_groups, updates, strict=True):
            group.update(update)
        self._switch_mode(is_train)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
