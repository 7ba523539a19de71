"""What an optimizer keeps for a parameter group while it runs, and what changes in it between steps."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, TypeAlias, TypedDict, TypeGuard

import torch
from torch import Tensor

from dash_shampoo.base.embedded import configs
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerList

Averaging: TypeAlias = configs.GeneralizedPrimalAveragingConfig | configs.ScheduleFreeConfig
_SMALLEST_LR_SUM = torch.finfo(torch.float32).tiny


class GroupState(TypedDict, total=False):
    """The lists of a group, under the keys of Meta's class.

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


def is_averaging(config: object) -> TypeGuard[Averaging]:
    """Whether there is a second sequence Z (with train and eval modes)."""
    return isinstance(config, Averaging)


def add_state(state_lists: GroupState, group: dict[str, Any], state: Mapping[Tensor, Any]) -> None:
    """Adds what is no preconditioner's: counts and coefficients, filtered gradients, momentum, averaging.

    Scalars are tensors, so that compiled steps take them as inputs.

    Raises:
        NotImplementedError: If the kind of averaging is not known.
    """
    device, dtype = group["params"][0].device, torch.float32
    # On the CPU, where counting and reading it waits for no device.
    state_lists["step"] = torch.tensor(0, dtype=torch.int64, device="cpu")
    state_lists["distributor"].step = state_lists["step"]
    state_lists["lr_tensor"] = torch.empty((), dtype=dtype, device=device)
    state_lists["lr_cpu_pinned"] = torch.empty((), dtype=dtype, pin_memory=group["use_pin_memory"])
    state_lists["train_interp_coeff"] = torch.zeros((), dtype=dtype, device=device)
    state_lists["eval_interp_coeff"] = torch.zeros((), dtype=dtype, device=device)
    shared = {"step": state_lists["step"]}
    if group["betas"][0] != 0.0:
        _add_buffer(state_lists, "filtered_grad", state)
    averaging = group["iterate_averaging_config"]
    if isinstance(averaging, configs.ClassicMomentumConfig):
        _add_buffer(state_lists, "momentum_buffer", state)
    elif is_averaging(averaging):
        _add_buffer(state_lists, "weight_buffer", state)
        take_weights(state_lists)  # for a checkpoint before the first step
        shared["train_mode"] = state_lists["train_mode"] = torch.tensor(True, device="cpu")
        shared["lr_sum"] = state_lists["lr_sum"] = torch.tensor(0.0, dtype=dtype, device=device)
    elif averaging is not None:
        raise NotImplementedError(f"iterate_averaging_config={averaging!r} is not known.")
    for param in group["params"]:
        state[param].update(shared)


def _add_buffer(state_lists: Any, name: str, state: Mapping[Tensor, Any]) -> None:
    distributor = state_lists["distributor"]
    buffers = tuple(
        info.add_zeros_like(block, state, name)
        for block, info in zip(
            distributor.local_blocked_params, distributor.local_block_info_list, strict=True
        )
    )
    state_lists[f"{name}_list"] = state_lists[f"masked_{name}_list"] = buffers


def mask_state_lists(state_lists: Any) -> bool:
    """Restricts all lists to the blocks that have a gradient in this step.

    Returns:
        Whether the selection differs from the previous step's.
    """
    distributor = state_lists["distributor"]
    selector, previous = distributor.local_grad_selector, state_lists["previous_grad_selector"]
    if selector == previous:
        return False
    state_lists["previous_grad_selector"] = selector
    state_lists["masked_blocked_params"] = distributor.local_masked_blocked_params
    for preconditioners in ("shampoo_preconditioner_list", "grafting_preconditioner_list"):
        if state_lists[preconditioners] is not None:
            state_lists[preconditioners].compress_preconditioner_list(selector)
    for buffers in ("filtered_grad_list", "momentum_buffer_list", "weight_buffer_list"):
        if buffers in state_lists:
            state_lists[f"masked_{buffers}"] = tuple(compress(state_lists[buffers], selector))
    return previous is not None


def take_weights(state_lists: GroupState) -> None:
    """Z ← W before the first step of a group that averages: only then W is what is trained.

    In the constructor, the weights of the first process may not have arrived at the others.
    """
    buffers = state_lists.get("weight_buffer_list")
    if buffers and state_lists["step"].item() == 0:
        distributor = state_lists["distributor"]
        if isinstance(distributor, Distributor):  # and not Meta's
            distributor.refresh_blocked_params()
        torch._foreach_copy_(buffers, distributor.local_blocked_params)


def set_interpolation_coefficients(state_lists: GroupState, config: object, is_step: bool) -> None:
    """Fills μ_y and, in a step, μ_x; the sum of the learning rates' powers grows with each step."""
    if not is_averaging(config):
        return
    state_lists["train_interp_coeff"].fill_(config.train_interp_coeff)
    if isinstance(config, configs.GeneralizedPrimalAveragingConfig):
        state_lists["eval_interp_coeff"].fill_(config.eval_interp_coeff)
    elif is_step:
        # μ_x = 1 - lr_t^r / Σ_{i≤t} lr_i^r, and 1 as long as a warm-up has learning rate zero.
        power = torch.pow(state_lists["lr_tensor"], config.eval_coeff_lr_power)
        lr_sum = state_lists["lr_sum"].add_(power).clamp(min=_SMALLEST_LR_SUM)
        state_lists["eval_interp_coeff"].copy_(1.0 - power / lr_sum)


def is_refresh_due(group: Mapping[str, Any], step: int) -> bool:
    """Whether the amortized computation is due: at the start, and then every so many steps."""
    start = group["start_preconditioning_step"]
    is_in_turn = step > start and step % group["precondition_frequency"] == 0
    return bool(step == start or is_in_turn)


def step_arguments(group: dict[str, Any], step: int) -> dict[str, Any]:
    """What a step of a group does, apart from tensors, as arguments of _compute_search_directions."""
    averaging = group["iterate_averaging_config"]
    use_grafting = group["grafting_config"] is not None
    return {
        "beta1": group["betas"][0],
        "beta3": group["beta3"],
        "weight_decay": group["weight_decay"],
        "peak_lr": group["peak_lr"],
        "weight_decay_type": group["weight_decay_type"],
        "grafting_config_not_none": use_grafting,
        "perform_amortized_computation": is_refresh_due(group, step),
        "use_bias_correction": group["use_bias_correction"],
        "use_grafting_method": use_grafting and step < group["start_preconditioning_step"],
        "iterate_averaging_enabled": is_averaging(averaging),
        "classic_momentum_enabled": isinstance(averaging, configs.ClassicMomentumConfig),
        "momentum_param": getattr(averaging, "momentum", 0.0),
        "dampening": getattr(averaging, "dampening", 0.0),
        "use_nesterov": getattr(averaging, "use_nesterov", False),
    }


def switch_mode(state_lists: GroupState, averaging: object, is_train: bool) -> None:
    """Moves the parameters from the evaluation sequence X to the training sequence Y, or back.

        Y = X + (1 - mu_y) * (Z - X),   X = Y + (1 - 1 / mu_y) * (Z - Y)

    Args:
        state_lists: The group's lists.
        averaging: The group's averaging; without, or where they are there already, they stay.
        is_train: Whether to Y.
    """
    if not is_averaging(averaging) or bool(state_lists["train_mode"]) == is_train:
        return
    set_interpolation_coefficients(state_lists, averaging, is_step=False)
    mu_y = state_lists["train_interp_coeff"]
    distributor = state_lists["distributor"]
    distributor.refresh_blocked_params()
    take_weights(state_lists)
    updates: tuple[Tensor, ...] = ()
    if buffers := state_lists["weight_buffer_list"]:
        updates = tuple(torch._foreach_sub(buffers, distributor.local_blocked_params))
        torch._foreach_mul_(updates, 1 - (mu_y if is_train else mu_y.reciprocal()))
    distributor.update_params(updates, use_masked_tensors=False)
    state_lists["train_mode"].fill_(is_train)
