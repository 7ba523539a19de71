"""The arithmetic of one step of a parameter group, on lists of blocks.

W: parameters, G: gradients, P: search directions, Z: the unaveraged sequence of primal averaging.
"""

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


class ShampooStep:
    """What a step does between the gradients and the update: the base class of DistributedShampoo.

    Every operation here is elementwise on the tensors of a list, but for the two preconditioner lists
    and the norms of grafting. So `_compute_search_directions` works on any tensors that `state_lists`
    holds: blocks, or whole buckets of them where `_precondition_and_grafting` is overridden too.
    """

    def _compute_search_directions(
        self,
        state_lists: dict[str, Any],
        step: Tensor,
        lr: Tensor,
        beta1: float,
        beta3: float,
        weight_decay: float,
        peak_lr: float,
        weight_decay_type: WeightDecayType,
        grafting_config_not_none: bool,
        perform_amortized_computation: bool,
        use_bias_correction: bool,
        use_grafting_method: bool,
        iterate_averaging_enabled: bool,
        classic_momentum_enabled: bool,
        train_interp_coeff: Tensor,
        eval_interp_coeff: Tensor,
        momentum_param: float,
        dampening: float,
        use_nesterov: bool,
    ) -> tuple[Tensor, ...]:
        """Computes what is added to the blocks that have a gradient, and updates their state.

        Args:
            state_lists: The group's lists. Read are the masked lists, the preconditioner lists,
                LR_CPU_PINNED and TRAIN_MODE.
            step: Step count, a CPU tensor.
            lr: Learning rate, a tensor on the device of the parameters.
            beta1: Decay of the gradients' EMA.
            beta3: Decay of the EMA that the step itself uses.
            weight_decay: Weight decay.
            peak_lr: What the learning rate is relative to in CORRECTED and INDEPENDENT decay.
            weight_decay_type: How it decays.
            grafting_config_not_none: Whether there is grafting.
            perform_amortized_computation: Whether inverse roots are due.
            use_bias_correction: Whether the EMA is corrected.
            use_grafting_method: Whether the step is the grafting's alone.
            iterate_averaging_enabled: Whether there is a second sequence Z.
            classic_momentum_enabled: Whether there is momentum.
            train_interp_coeff: μ_y of the averaging.
            eval_interp_coeff: μ_x of the averaging.
            momentum_param: Factor of the momentum.
            dampening: Dampening of the momentum.
            use_nesterov: Whether the momentum is Nesterov's.

        Returns:
            The increments, one per tensor of the masked lists, in new memory.

        Raises:
            RuntimeError: If averaging is in eval mode.
        """
        grads = state_lists[keys.MASKED_BLOCKED_GRADS]
        params = state_lists[keys.MASKED_BLOCKED_PARAMS]
        # L2 regularization:
        #   G <- G + weight_decay * W      (in new memory: the gradients are the user's)
        if weight_decay != 0.0 and weight_decay_type == WeightDecayType.L2:
            grads = tuple(torch._foreach_add(grads, params, alpha=weight_decay))

        # Preconditioners of Shampoo and of the grafting:
        #   F_k <- beta2 * F_k + w * G_(k) G_(k)^T,   R_k <- F_k^(-1/p_k) when due
        #   V <- beta2 * V + w * G^2
        self._update_preconditioners(
            state_lists, grads, step, perform_amortized_computation, grafting_config_not_none
        )

        # Filtered gradient, with a beta of its own for this step (as Lion and NAdam have):
        #   G_bar <- beta3 * G_tilde + (1 - beta3) * G,   G_tilde <- beta1 * G_tilde + (1 - beta1) * G
        if beta1 != 0.0:
            averages = state_lists[keys.MASKED_FILTERED_GRAD_LIST]
            correction = 1.0 - beta3 * beta1 ** (step - 1) if use_bias_correction else None
            grads = _filter(averages, grads, beta1, beta3, correction)

        #   P <- R_1 x G_bar x R_2 ..., with the norm of the grafting's direction
        directions = self._precondition_and_grafting(
            state_lists, grads, use_grafting_method, grafting_config_not_none
        )

        # Decoupled weight decay:
        #   P <- P + alpha * W, or with averaging Z <- (1 - lr * alpha) * Z
        if weight_decay != 0.0 and weight_decay_type != WeightDecayType.L2:
            pinned_lr = state_lists[keys.LR_CPU_PINNED]
            alpha = weight_decay * _relative_decay(weight_decay_type, pinned_lr, peak_lr)
            if iterate_averaging_enabled:
                torch._foreach_mul_(state_lists[keys.MASKED_WEIGHT_BUFFER_LIST], 1 - lr * alpha)
            else:
                torch._foreach_add_(directions, params, alpha=alpha)

        #   M <- momentum * M + (1 - dampening) * P
        if classic_momentum_enabled:
            buffers = state_lists[keys.MASKED_MOMENTUM_BUFFER_LIST]
            _apply_momentum(buffers, directions, momentum_param, 1 - dampening, use_nesterov)

        torch._foreach_mul_(directions, -lr)

        #   P <- (1 - mu_x * mu_y) * P + (1 - mu_x) * (Z - W),   Z <- Z - lr * P
        if iterate_averaging_enabled:
            if not state_lists[keys.TRAIN_MODE]:
                raise RuntimeError("The optimizer is in eval mode: call its train() before step().")
            buffers = state_lists[keys.MASKED_WEIGHT_BUFFER_LIST]
            _average(buffers, directions, params, eval_interp_coeff, train_interp_coeff)
        return directions

    def _update_preconditioners(
        self,
        state_lists: dict[str, Any],
        grads: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool,
        grafting_config_not_none: bool,
    ) -> None:
        state_lists[keys.SHAMPOO_PRECONDITIONER_LIST].update_preconditioners(
            masked_grad_list=grads,
            step=step,
            perform_amortized_computation=perform_amortized_computation,
        )
        if grafting_config_not_none:
            state_lists[keys.GRAFTING_PRECONDITIONER_LIST].update_preconditioners(
                masked_grad_list=grads, step=step
            )

    def _precondition_and_grafting(
        self,
        state_lists: dict[str, Any],
        masked_filtered_grad_list: tuple[Tensor, ...],
        use_grafting_method: bool,
        grafting_config_not_none: bool,
    ) -> tuple[Tensor, ...]:
        """P = P_shampoo · ‖P_grafting‖ / ‖P_shampoo‖ by block; P_grafting before the start step."""
        grafted: tuple[Tensor, ...] = ()
        if grafting_config_not_none:
            grafted = tuple(
                state_lists[keys.GRAFTING_PRECONDITIONER_LIST].precondition(
                    masked_grad_list=masked_filtered_grad_list
                )
            )
            if use_grafting_method:
                return grafted
        directions: tuple[Tensor, ...] = state_lists[keys.SHAMPOO_PRECONDITIONER_LIST].precondition(
            masked_grad_list=masked_filtered_grad_list
        )
        if grafting_config_not_none:
            scales = torch._foreach_norm(grafted)
            norms = torch._foreach_norm(directions)
            torch._foreach_add_(norms, _SMALLEST_NORM)
            torch._foreach_div_(scales, norms)
            torch._foreach_mul_(directions, scales)
        return directions


def step_arguments(group: dict[str, Any], step: int) -> dict[str, Any]:
    """What a step of a group does, apart from tensors, as arguments of _compute_search_directions."""
    start = group[keys.START_PRECONDITIONING_STEP]
    is_due = step % group[keys.PRECONDITION_FREQUENCY] == 0 and step > start
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
        "perform_amortized_computation": is_due or step == start,
        "use_bias_correction": group[keys.USE_BIAS_CORRECTION],
        "use_grafting_method": use_grafting and step < start,
        "iterate_averaging_enabled": is_averaging(averaging),
        "classic_momentum_enabled": momentum is not None,
        "momentum_param": 0.0 if momentum is None else momentum.momentum,
        "dampening": 0.0 if momentum is None else momentum.dampening,
        "use_nesterov": momentum is not None and momentum.use_nesterov,
    }


def _filter(
    averages: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    beta1: float,
    beta3: float,
    bias_correction1: Tensor | None,
) -> tuple[Tensor, ...]:
    filtered: tuple[Tensor, ...] = averages
    if beta3 != beta1:
        filtered = tuple(torch._foreach_lerp(averages, grads, weight=1 - beta3))
    torch._foreach_lerp_(averages, grads, weight=1 - beta1)
    if bias_correction1 is None:
        return filtered
    return tuple(torch._foreach_div(filtered, scalar_of(bias_correction1)))


def _relative_decay(weight_decay_type: WeightDecayType, pinned_lr: Tensor, peak_lr: float) -> float:
    match weight_decay_type:
        case WeightDecayType.DECOUPLED:
            return 1.0
        case WeightDecayType.CORRECTED:
            # Read from the CPU: reading the learning rate on the device would wait for it.
            return pinned_lr.item() / peak_lr
        case WeightDecayType.INDEPENDENT:
            return 1 / peak_lr
        case _:
            raise ValueError(f"Invalid weight_decay_type={weight_decay_type!r}.")


def _apply_momentum(
    buffers: tuple[Tensor, ...],
    directions: tuple[Tensor, ...],
    momentum: float,
    undamped: float,
    use_nesterov: bool,
) -> None:
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, directions, alpha=undamped)
    if use_nesterov:
        torch._foreach_mul_(directions, undamped)
        torch._foreach_add_(directions, buffers, alpha=momentum)
    else:
        torch._foreach_copy_(directions, buffers)


def _average(
    buffers: tuple[Tensor, ...],
    directions: tuple[Tensor, ...],
    params: tuple[Tensor, ...],
    mu_x: Tensor,
    mu_y: Tensor,
) -> None:
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
