"""The arithmetic of one step of a parameter group, on lists of blocks.

W: parameters, G: gradients, P: search directions, Z: the unaveraged sequence of primal averaging.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.configs import (
    ClassicMomentumConfig,
    GeneralizedPrimalAveragingConfig,
    IterateAveragingConfig,
    ScheduleFreeConfig,
    WeightDecayType,
)
from dash_shampoo.base.embedded.preconditioner_list import scalar_of

# Keeps the grafting's quotient of norms finite for a direction of zeros.
_SMALLEST_NORM = 1e-16
_SMALLEST_LR_SUM = torch.finfo(torch.float32).tiny


def is_averaging(config: IterateAveragingConfig | None) -> bool:
    """Whether there is a second sequence Z (with train and eval modes)."""
    return isinstance(config, (GeneralizedPrimalAveragingConfig, ScheduleFreeConfig))


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step of a group does, apart from tensors; fields as in the parameter group."""

    beta1: float
    beta3: float
    weight_decay: float
    weight_decay_type: WeightDecayType
    peak_lr: float
    use_bias_correction: bool
    is_averaging: bool
    momentum: ClassicMomentumConfig | None
    use_grafting: bool
    is_warm_up: bool
    perform_amortized_computation: bool

    @classmethod
    def of(cls, group: dict[str, Any], step: int) -> "StepSettings":
        """The settings of a group at a step (counted from one)."""
        start = group[keys.START_PRECONDITIONING_STEP]
        is_due = step % group[keys.PRECONDITION_FREQUENCY] == 0 and step > start
        averaging = group[keys.ITERATE_AVERAGING_CONFIG]
        use_grafting = group[keys.GRAFTING_CONFIG] is not None
        return cls(
            beta1=group[keys.BETAS][0],
            beta3=group[keys.BETA3],
            weight_decay=group[keys.WEIGHT_DECAY],
            weight_decay_type=group[keys.WEIGHT_DECAY_TYPE],
            peak_lr=group[keys.PEAK_LR],
            use_bias_correction=group[keys.USE_BIAS_CORRECTION],
            is_averaging=is_averaging(averaging),
            momentum=averaging if isinstance(averaging, ClassicMomentumConfig) else None,
            use_grafting=use_grafting,
            is_warm_up=use_grafting and step < start,
            perform_amortized_computation=is_due or step == start,
        )


def mask_state_lists(state_lists: dict[str, Any]) -> bool:
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
    for key in (keys.SHAMPOO_PRECONDITIONER_LIST, keys.GRAFTING_PRECONDITIONER_LIST):
        if state_lists[key] is not None:
            state_lists[key].compress_preconditioner_list(local_grad_selector=selector)
    for key, masked_key in keys.BUFFER_LISTS.values():
        if key in state_lists:
            state_lists[masked_key] = tuple(compress(state_lists[key], selector))
    return previous is not None


def set_interpolation_coefficients(
    state_lists: dict[str, Any], config: IterateAveragingConfig | None, is_step: bool
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


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function: what `torch.compiler.disable` is applied to where a step is compiled."""
    return function(*args)


def search_directions(
    state_lists: dict[str, Any], settings: StepSettings, run: Callable[..., Any] = call
) -> tuple[Tensor, ...]:
    """Computes what is added to the blocks that have a gradient, and updates their state.

    Args:
        state_lists: The group's lists, with the blocked gradients in MASKED_BLOCKED_GRADS.
        settings: The step's settings.
        run: Calls the preconditioners, which stay out of a compiled step: their lists change with
            the selection of gradients, and their matmuls gain nothing. (Default: call)

    Returns:
        The increments of the blocks, in new memory.
    """
    grads = state_lists[keys.MASKED_BLOCKED_GRADS]
    params = state_lists[keys.MASKED_BLOCKED_PARAMS]
    # L2 regularization:
    #   G <- G + weight_decay * W      (in new memory: the gradients are the user's)
    if settings.weight_decay != 0.0 and settings.weight_decay_type == WeightDecayType.L2:
        grads = tuple(torch._foreach_add(grads, params, alpha=settings.weight_decay))

    # Preconditioners of Shampoo and of the grafting:
    #   F_k <- beta2 * F_k + w * G_(k) G_(k)^T,   R_k <- F_k^(-1/p_k) when due
    #   V <- beta2 * V + w * G^2
    run(_update_preconditioners, state_lists, grads, settings)

    # Filtered gradient, with a beta of its own for this step (as Lion and NAdam have):
    #   G_bar <- beta3 * G_tilde + (1 - beta3) * G,   G_tilde <- beta1 * G_tilde + (1 - beta1) * G
    grads = _filtered(state_lists, grads, settings)

    #   P <- R_1 x G_bar x R_2 ..., with the norm of the grafting's direction
    directions: tuple[Tensor, ...] = run(_precondition_and_graft, state_lists, grads, settings)

    # Decoupled weight decay:
    #   P <- P + alpha * W, or with averaging Z <- (1 - lr * alpha) * Z
    _decay(state_lists, directions, settings)

    #   M <- momentum * M + (1 - dampening) * P
    if settings.momentum is not None:
        _apply_momentum(
            state_lists[keys.MASKED_MOMENTUM_BUFFER_LIST], directions, settings.momentum
        )

    torch._foreach_mul_(directions, -state_lists[keys.LR_TENSOR])

    #   P <- (1 - mu_x * mu_y) * P + (1 - mu_x) * (Z - W),   Z <- Z - lr * P
    if settings.is_averaging:
        _average(state_lists, directions, params)
    return directions


def _update_preconditioners(
    state_lists: dict[str, Any], grads: tuple[Tensor, ...], settings: StepSettings
) -> None:
    state_lists[keys.SHAMPOO_PRECONDITIONER_LIST].update_preconditioners(
        masked_grad_list=grads,
        step=state_lists[keys.STEP],
        perform_amortized_computation=settings.perform_amortized_computation,
    )
    if settings.use_grafting:
        state_lists[keys.GRAFTING_PRECONDITIONER_LIST].update_preconditioners(
            masked_grad_list=grads, step=state_lists[keys.STEP]
        )


def _filtered(
    state_lists: dict[str, Any], grads: tuple[Tensor, ...], settings: StepSettings
) -> tuple[Tensor, ...]:
    beta1, beta3 = settings.beta1, settings.beta3
    if beta1 == 0.0:
        return grads
    averages = state_lists[keys.MASKED_FILTERED_GRAD_LIST]
    filtered: tuple[Tensor, ...] = averages
    if beta3 != beta1:
        filtered = tuple(torch._foreach_lerp(averages, grads, weight=1 - beta3))
    torch._foreach_lerp_(averages, grads, weight=1 - beta1)
    if settings.use_bias_correction:
        bias_correction1 = 1.0 - beta3 * beta1 ** (state_lists[keys.STEP] - 1)
        filtered = tuple(torch._foreach_div(filtered, scalar_of(bias_correction1)))
    return filtered


def _precondition_and_graft(
    state_lists: dict[str, Any], grads: tuple[Tensor, ...], settings: StepSettings
) -> tuple[Tensor, ...]:
    """P = P_shampoo · ‖P_grafting‖ / ‖P_shampoo‖ by block; P_grafting before the start step."""
    grafting_list = state_lists[keys.GRAFTING_PRECONDITIONER_LIST]
    grafted: tuple[Tensor, ...] = ()
    if settings.use_grafting:
        grafted = tuple(grafting_list.precondition(masked_grad_list=grads))
        if settings.is_warm_up:
            return grafted
    directions: tuple[Tensor, ...] = state_lists[keys.SHAMPOO_PRECONDITIONER_LIST].precondition(
        masked_grad_list=grads
    )
    if settings.use_grafting:
        scales = torch._foreach_norm(grafted)
        norms = torch._foreach_norm(directions)
        torch._foreach_add_(norms, _SMALLEST_NORM)
        torch._foreach_div_(scales, norms)
        torch._foreach_mul_(directions, scales)
    return directions


def _decay(
    state_lists: dict[str, Any], directions: tuple[Tensor, ...], settings: StepSettings
) -> None:
    if settings.weight_decay == 0.0:
        return
    alpha = settings.weight_decay
    match settings.weight_decay_type:
        case WeightDecayType.L2:
            return
        case WeightDecayType.DECOUPLED:
            pass
        case WeightDecayType.CORRECTED:
            alpha *= state_lists[keys.LR_CPU_PINNED].item() / settings.peak_lr
        case WeightDecayType.INDEPENDENT:
            alpha /= settings.peak_lr
        case _:
            raise ValueError(f"Invalid weight_decay_type={settings.weight_decay_type!r}.")
    if settings.is_averaging:
        torch._foreach_mul_(
            state_lists[keys.MASKED_WEIGHT_BUFFER_LIST], 1 - state_lists[keys.LR_TENSOR] * alpha
        )
    else:
        torch._foreach_add_(directions, state_lists[keys.MASKED_BLOCKED_PARAMS], alpha=alpha)


def _apply_momentum(
    buffers: tuple[Tensor, ...], directions: tuple[Tensor, ...], config: ClassicMomentumConfig
) -> None:
    undamped = 1 - config.dampening
    torch._foreach_mul_(buffers, config.momentum)
    torch._foreach_add_(buffers, directions, alpha=undamped)
    if config.use_nesterov:
        torch._foreach_mul_(directions, undamped)
        torch._foreach_add_(directions, buffers, alpha=config.momentum)
    else:
        torch._foreach_copy_(directions, buffers)


def _average(
    state_lists: dict[str, Any], directions: tuple[Tensor, ...], params: tuple[Tensor, ...]
) -> None:
    if not state_lists[keys.TRAIN_MODE]:
        raise RuntimeError("The optimizer is in eval mode: call its train() before step().")
    mu_x, mu_y = state_lists[keys.EVAL_INTERP_COEFF], state_lists[keys.TRAIN_INTERP_COEFF]
    buffers = state_lists[keys.MASKED_WEIGHT_BUFFER_LIST]
    # Z - W with the Z from before this step.
    differences = torch._foreach_sub(buffers, params)
    torch._foreach_add_(buffers, directions)
    torch._foreach_mul_(directions, 1 - mu_y * mu_x)
    torch._foreach_mul_(differences, 1 - mu_x)
    torch._foreach_add_(directions, differences)


def switch_mode(
    state_lists: dict[str, Any], averaging: IterateAveragingConfig, is_train: bool
) -> None:
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
    updates: tuple[Tensor, ...] = ()
    if buffers := state_lists[keys.WEIGHT_BUFFER_LIST]:
        updates = tuple(torch._foreach_sub(buffers, distributor.local_blocked_params))
        torch._foreach_mul_(updates, 1 - (mu_y if is_train else mu_y.reciprocal()))
    distributor.update_params(updates, use_masked_tensors=False)
    state_lists[keys.TRAIN_MODE].fill_(is_train)
