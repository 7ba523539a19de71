"""The arithmetic of one step of a parameter group, on lists of blocks.

W: parameters, G: gradients, P: search directions, Z: the unaveraged sequence of primal averaging.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded.configs import WeightDecayType
from dash_shampoo.base.embedded.preconditioner_list import Tensors, divisor_of

# Keeps the grafting's quotient of norms finite for a direction of zeros.
_SMALLEST_NORM = 1e-16


class ShampooStep:
    """What a step does between the gradients and the update: the base class of DistributedShampoo.

    `state_lists` is a GroupState; to overrides it is a dict, as in Meta's class.

    Every operation here is elementwise on the tensors of a list, but for the two preconditioner lists
    and the norms of grafting. So `_compute_search_directions` works on any tensors that `state_lists`
    holds: blocks, or whole buckets of them where `_precondition_and_grafting` is overridden too.
    """

    def _compute_search_directions(
        self,
        state_lists: Any,
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
    ) -> Sequence[Tensor]:
        """Computes what is added to the blocks that have a gradient, and updates their state.

        In this order:

            G <- G + weight_decay·W                                   L2 decay, in new memory
            F_k <- beta2·F_k + w·G_(k) G_(k)ᵀ,  R_k <- F_k^(-1/p_k) when due,  V <- beta2·V + w·G²
            G_bar <- beta3·G_tilde + (1 - beta3)·G,  G_tilde <- beta1·G_tilde + (1 - beta1)·G
            P <- R_1 × G_bar × R_2 ...                                with the norm of grafting's P
            P <- P + alpha·W, or with averaging Z <- (1 - lr·alpha)·Z decoupled decay
            M <- momentum·M + (1 - dampening)·P
            P <- (1 - mu_x·mu_y)·P + (1 - mu_x)·(Z - W),  Z <- Z - lr·P   averaging

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
        grads = state_lists["masked_blocked_grads"]
        if weight_decay != 0.0 and weight_decay_type == WeightDecayType.L2:
            params = state_lists["masked_blocked_params"]
            grads = tuple(torch._foreach_add(grads, params, alpha=weight_decay))

        self._update_preconditioners(
            state_lists, grads, step, perform_amortized_computation, grafting_config_not_none
        )

        if beta1 != 0.0:
            correction = 1.0 - beta3 * beta1 ** (step - 1) if use_bias_correction else None
            averages = state_lists["masked_filtered_grad_list"]
            grads = _filter(averages, grads, beta1, beta3, correction)

        directions = self._precondition_and_grafting(
            state_lists, grads, use_grafting_method, grafting_config_not_none
        )

        if weight_decay != 0.0 and weight_decay_type != WeightDecayType.L2:
            alpha = weight_decay * _relative_decay(weight_decay_type, state_lists, peak_lr)
            if iterate_averaging_enabled:
                torch._foreach_mul_(state_lists["masked_weight_buffer_list"], 1 - lr * alpha)
            else:
                params = state_lists["masked_blocked_params"]
                torch._foreach_add_(directions, params, alpha=alpha)

        if classic_momentum_enabled:
            buffers = state_lists["masked_momentum_buffer_list"]
            _apply_momentum(buffers, directions, momentum_param, 1 - dampening, use_nesterov)

        torch._foreach_mul_(directions, -lr)

        if iterate_averaging_enabled:
            # Looked up here: gathering them breaks a compiled graph, which must not be an inlined one.
            params = state_lists["masked_blocked_params"]
            _average(state_lists, directions, params, eval_interp_coeff, train_interp_coeff)
        return directions

    def _update_preconditioners(
        self,
        state_lists: Any,
        grads: Tensors,
        step: Tensor,
        perform_amortized_computation: bool,
        grafting_config_not_none: bool,
    ) -> None:
        shampoo = state_lists["shampoo_preconditioner_list"]
        shampoo.update_preconditioners(grads, step, perform_amortized_computation)
        if grafting_config_not_none:
            state_lists["grafting_preconditioner_list"].update_preconditioners(grads, step)

    def _precondition_and_grafting(
        self,
        state_lists: Any,
        masked_filtered_grad_list: Tensors,
        use_grafting_method: bool,
        grafting_config_not_none: bool,
    ) -> Tensors:
        """P = P_shampoo · ‖P_grafting‖ / ‖P_shampoo‖ by block; P_grafting before the start step."""
        grafted: Tensors = ()
        if grafting_config_not_none:
            grafting = state_lists["grafting_preconditioner_list"]
            grafted = tuple(grafting.precondition(masked_filtered_grad_list))
            if use_grafting_method:
                return grafted
        shampoo = state_lists["shampoo_preconditioner_list"]
        directions: Tensors = shampoo.precondition(masked_filtered_grad_list)
        if grafting_config_not_none:
            scales = torch._foreach_norm(grafted)
            norms = torch._foreach_norm(directions)
            torch._foreach_add_(norms, _SMALLEST_NORM)
            torch._foreach_div_(scales, norms)
            torch._foreach_mul_(directions, scales)
        return directions


def _filter(
    averages: Tensors, grads: Tensors, beta1: float, beta3: float, bias_correction1: Tensor | None
) -> Tensors:
    filtered: Tensors = averages
    if beta3 != beta1:
        filtered = tuple(torch._foreach_lerp(averages, grads, weight=1 - beta3))
    torch._foreach_lerp_(averages, grads, weight=1 - beta1)
    if bias_correction1 is None or (divisor := divisor_of(bias_correction1)) is None:
        return filtered
    return tuple(torch._foreach_div(filtered, divisor))


def _relative_decay(weight_decay_type: WeightDecayType, state_lists: Any, peak_lr: float) -> float:
    match weight_decay_type:
        case WeightDecayType.DECOUPLED:
            return 1.0
        case WeightDecayType.CORRECTED:
            # Read from the CPU: reading the learning rate on the device would wait for it.
            return float(state_lists["lr_cpu_pinned"].item() / peak_lr)
        case WeightDecayType.INDEPENDENT:
            return 1 / peak_lr
        case _:
            raise ValueError(f"Invalid weight_decay_type={weight_decay_type!r}.")


def _apply_momentum(
    buffers: Tensors, directions: Tensors, momentum: float, undamped: float, use_nesterov: bool
) -> None:
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, directions, alpha=undamped)
    if use_nesterov:
        torch._foreach_mul_(directions, undamped)
        torch._foreach_add_(directions, buffers, alpha=momentum)
    else:
        torch._foreach_copy_(directions, buffers)


def _average(
    state_lists: Any, directions: Tensors, params: Tensors, mu_x: Tensor, mu_y: Tensor
) -> None:
    if not state_lists["train_mode"]:
        raise RuntimeError("The optimizer is in eval mode: call its train() before step().")
    buffers = state_lists["masked_weight_buffer_list"]
    # Z - W with the Z from before this step.
    differences = torch._foreach_sub(buffers, params)
    torch._foreach_add_(buffers, directions)
    torch._foreach_mul_(directions, 1 - mu_y * mu_x)
    torch._foreach_mul_(differences, 1 - mu_x)
    torch._foreach_add_(directions, differences)
