"""What an optimizer keeps for a parameter group while it runs, and what changes in it between steps."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.configs import (
    ClassicMomentumConfig,
    GeneralizedPrimalAveragingConfig,
    IterateAveragingConfig,
    ScheduleFreeConfig,
)
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerList

_SMALLEST_LR_SUM = torch.finfo(torch.float32).tiny


class GroupState(TypedDict, total=False):
    """The lists of a group, under the keys of Meta's class; see `keys`.

    A masked list holds the blocks that have a gradient in this step. Lists of what a group does not use
    are absent.
    """

    distributor: Distributor
    shampoo_preconditioner_list: PreconditionerList
    grafting_preconditioner_list: PreconditionerList | None
    masked_blocked_grads: Sequence[Tensor] | None
    masked_blocked_params: tuple[Tensor, ...]
    previous_grad_selector: tuple[bool, ...] | None
    filtered_grad_list: tuple[Tensor, ...]
    masked_filtered_grad_list: tuple[Tensor, ...]
    momentum_buffer_list: tuple[Tensor, ...]
    masked_momentum_buffer_list: tuple[Tensor, ...]
    weight_buffer_list: tuple[Tensor, ...]
    masked_weight_buffer_list: tuple[Tensor, ...]
    step: Tensor
    lr_tensor: Tensor
    lr_cpu_pinned: Tensor
    lr_sum: Tensor
    train_mode: Tensor
    train_interp_coeff: Tensor
    eval_interp_coeff: Tensor


def is_averaging(config: IterateAveragingConfig | None) -> bool:
    """Whether there is a second sequence Z (with train and eval modes)."""
    return isinstance(config, (GeneralizedPrimalAveragingConfig, ScheduleFreeConfig))


def add_scalars(
    state_lists: GroupState, group: dict[str, Any], state: Mapping[Tensor, Any]
) -> None:
    """Step count and coefficients: as tensors, so that compiled steps take them as inputs."""
    device = group[keys.PARAMS][0].device
    # On the CPU, where counting and reading it waits for no device.
    state_lists[keys.STEP] = torch.tensor(0, dtype=torch.int64, device="cpu")
    state_lists[keys.DISTRIBUTOR].step = state_lists[keys.STEP]
    for param in group[keys.PARAMS]:
        state[param][keys.STEP] = state_lists[keys.STEP]
    state_lists[keys.LR_TENSOR] = torch.empty((), dtype=torch.float32, device=device)
    state_lists[keys.LR_CPU_PINNED] = torch.empty(
        (), dtype=torch.float32, pin_memory=group[keys.USE_PIN_MEMORY]
    )
    state_lists[keys.TRAIN_INTERP_COEFF] = torch.zeros((), dtype=torch.float32, device=device)
    state_lists[keys.EVAL_INTERP_COEFF] = torch.zeros((), dtype=torch.float32, device=device)


def add_buffers(
    state_lists: GroupState, group: dict[str, Any], state: Mapping[Tensor, Any]
) -> None:
    """The filtered gradients, and what momentum or averaging keep.

    Raises:
        NotImplementedError: If the kind of averaging is not known.
    """
    if group[keys.BETAS][0] != 0.0:
        _add_buffer(state_lists, keys.FILTERED_GRAD, state)
    match group[keys.ITERATE_AVERAGING_CONFIG]:
        case None:
            pass
        case ClassicMomentumConfig():
            _add_buffer(state_lists, keys.MOMENTUM_BUFFER, state)
        case GeneralizedPrimalAveragingConfig() | ScheduleFreeConfig():
            _add_buffer(state_lists, keys.WEIGHT_BUFFER, state)
            take_weights(state_lists)  # for a checkpoint before the first step
            device = group[keys.PARAMS][0].device
            state_lists[keys.LR_SUM] = torch.tensor(0.0, dtype=torch.float32, device=device)
            state_lists[keys.TRAIN_MODE] = torch.tensor(True, device="cpu")
            for param in group[keys.PARAMS]:
                state[param][keys.TRAIN_MODE] = state_lists[keys.TRAIN_MODE]
                state[param][keys.LR_SUM] = state_lists[keys.LR_SUM]
        case config:
            raise NotImplementedError(f"{keys.ITERATE_AVERAGING_CONFIG}={config!r} is not known.")


def _add_buffer(state_lists: GroupState, key: str, state: Mapping[Tensor, Any]) -> None:
    distributor = state_lists[keys.DISTRIBUTOR]
    buffers = []
    for block, info in zip(
        distributor.local_blocked_params, distributor.local_block_info_list, strict=True
    ):
        tensor = info.allocate_zeros_tensor(
            size=block.size(), dtype=block.dtype, device=block.device
        )
        info.block_state(state)[key] = tensor
        buffers.append(info.get_tensor(tensor))
    lists = cast("dict[str, Any]", state_lists)
    lists.update(dict.fromkeys(keys.BUFFER_LISTS[key], tuple(buffers)))


def mask_state_lists(state_lists: GroupState) -> bool:
    """Restricts all lists to the blocks that have a gradient in this step.

    Returns:
        Whether the selection differs from the previous step's.
    """
    distributor = state_lists[keys.DISTRIBUTOR]
    selector = distributor.local_grad_selector
    previous = state_lists[keys.PREVIOUS_GRAD_SELECTOR]
    if selector == previous:
        return False
    state_lists[keys.PREVIOUS_GRAD_SELECTOR] = selector
    state_lists[keys.MASKED_BLOCKED_PARAMS] = distributor.local_masked_blocked_params
    state_lists[keys.SHAMPOO_PRECONDITIONER_LIST].compress_preconditioner_list(selector)
    if (grafting := state_lists[keys.GRAFTING_PRECONDITIONER_LIST]) is not None:
        grafting.compress_preconditioner_list(selector)
    lists: dict[str, Any] = cast("dict[str, Any]", state_lists)
    for key, masked_key in keys.BUFFER_LISTS.values():
        if key in lists:
            lists[masked_key] = tuple(compress(lists[key], selector))
    return previous is not None


def take_weights(state_lists: GroupState) -> None:
    """Z ← W before the first step of a group that averages: only then W is what is trained.

    In the constructor, the weights of the first process may not have arrived at the others.
    """
    buffers = state_lists.get(keys.WEIGHT_BUFFER_LIST)
    if buffers and state_lists[keys.STEP].item() == 0:
        distributor = state_lists[keys.DISTRIBUTOR]
        if isinstance(distributor, Distributor):  # and not Meta's
            distributor.refresh_blocked_params()
        torch._foreach_copy_(buffers, distributor.local_blocked_params)


def set_interpolation_coefficients(
    state_lists: GroupState, config: IterateAveragingConfig | None, is_step: bool
) -> None:
    """Fills μ_y and, in a step, μ_x; the sum of the learning rates' powers grows with each step."""
    if isinstance(config, GeneralizedPrimalAveragingConfig):
        state_lists[keys.TRAIN_INTERP_COEFF].fill_(config.train_interp_coeff)
        state_lists[keys.EVAL_INTERP_COEFF].fill_(config.eval_interp_coeff)
    elif isinstance(config, ScheduleFreeConfig):
        state_lists[keys.TRAIN_INTERP_COEFF].fill_(config.train_interp_coeff)
        if is_step:
            # μ_x = 1 - lr_t^r / Σ_{i≤t} lr_i^r, and 1 as long as a warm-up has learning rate zero.
            power = torch.pow(state_lists[keys.LR_TENSOR], config.eval_coeff_lr_power)
            lr_sum = state_lists[keys.LR_SUM].add_(power).clamp(min=_SMALLEST_LR_SUM)
            state_lists[keys.EVAL_INTERP_COEFF].copy_(1.0 - power / lr_sum)


def is_refresh_due(group: Mapping[str, Any], step: int) -> bool:
    """Whether the amortized computation is due: at the start, and then every so many steps."""
    start = group[keys.START_PRECONDITIONING_STEP]
    is_in_turn = step > start and step % group[keys.PRECONDITION_FREQUENCY] == 0
    return bool(step == start or is_in_turn)


def step_arguments(group: dict[str, Any], step: int) -> dict[str, Any]:
    """What a step of a group does, apart from tensors, as arguments of _compute_search_directions."""
    averaging = group[keys.ITERATE_AVERAGING_CONFIG]
    momentum = averaging if isinstance(averaging, ClassicMomentumConfig) else None
    use_grafting = group[keys.GRAFTING_CONFIG] is not None
    return {
        "beta1": group[keys.BETAS][0],
        "beta3": group[keys.BETA3],
        "weight_decay": group[keys.WEIGHT_DECAY],
        "peak_lr": group[keys.PEAK_LR],
        "weight_decay_type": group[keys.WEIGHT_DECAY_TYPE],
        "grafting_config_not_none": use_grafting,
        "perform_amortized_computation": is_refresh_due(group, step),
        "use_bias_correction": group[keys.USE_BIAS_CORRECTION],
        "use_grafting_method": use_grafting and step < group[keys.START_PRECONDITIONING_STEP],
        "iterate_averaging_enabled": is_averaging(averaging),
        "classic_momentum_enabled": momentum is not None,
        "momentum_param": 0.0 if momentum is None else momentum.momentum,
        "dampening": 0.0 if momentum is None else momentum.dampening,
        "use_nesterov": momentum is not None and momentum.use_nesterov,
    }


def switch_mode(state_lists: GroupState, averaging: IterateAveragingConfig, is_train: bool) -> None:
    """Moves the parameters from the evaluation sequence X to the training sequence Y, or back.

        Y = X + (1 - mu_y) * (Z - X),   X = Y + (1 - 1 / mu_y) * (Z - Y)

    Args:
        state_lists: The group's lists.
        averaging: The group's averaging.
        is_train: Whether to Y.
    """
    set_interpolation_coefficients(state_lists, averaging, is_step=False)
    mu_y = state_lists[keys.TRAIN_INTERP_COEFF]
    distributor = state_lists[keys.DISTRIBUTOR]
    distributor.refresh_blocked_params()
    take_weights(state_lists)
    updates: tuple[Tensor, ...] = ()
    if buffers := state_lists[keys.WEIGHT_BUFFER_LIST]:
        updates = tuple(torch._foreach_sub(buffers, distributor.local_blocked_params))
        torch._foreach_mul_(updates, 1 - (mu_y if is_train else mu_y.reciprocal()))
    distributor.update_params(updates, use_masked_tensors=False)
    state_lists[keys.TRAIN_MODE].fill_(is_train)
