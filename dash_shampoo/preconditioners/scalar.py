"""AdaGrad, RMSprop and Adam with one second moment for a whole block, on either base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base import AdagradPreconditionerList, PreconditionerConfig
from dash_shampoo.inverse_root.fields import check_field


@dataclass(kw_only=True)
class ScalarAdaGradPreconditionerConfig(PreconditionerConfig):
    """G / (√v + epsilon), where v is the sum over the steps of the mean of G²: AdaGrad by blocks.

    Choose this where gradients do not die out, as in sparse or online problems.

    A block keeps the direction of its gradient, and has the length that AdaGrad would give it on
    average; the state is one number for each block. As grafting it costs no memory beside Shampoo's. As
    `preconditioner_config` of a group it is normalised gradient descent.

    A release of Distributed Shampoo that is newer than the one this package is tested with has scalar
    preconditioners, of which no more than that is public. So these are this package's own: names,
    state (key "adagrad", a float32 number) and the mean (where it might be the sum) need not be theirs.

    Attributes:
        epsilon (float): Damping, positive. (Default: 1e-10)

    References:
        Ward, Wu and Bottou, AdaGrad stepsizes, arXiv 1806.01811.
    """

    epsilon: float = 1e-10

    def __post_init__(self) -> None:
        check_field(self, "epsilon", self.epsilon > 0.0, "above 0")


@dataclass(kw_only=True)
class ScalarRMSpropPreconditionerConfig(ScalarAdaGradPreconditionerConfig):
    """As `ScalarAdaGradPreconditionerConfig`, with v a moving average.

    Choose this to follow RMSprop: v begins at zero and is not corrected for that, so that the first
    steps are longer than those of `ScalarAdamPreconditionerConfig`.

    Attributes:
        epsilon (float): Damping, positive. (Default: 1e-10)
        beta2 (float): Decay of v, in (0, 1]; 1 sums. (Default: 0.99)
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "beta2", 0.0 < self.beta2 <= 1.0, "in (0, 1]")


@dataclass(kw_only=True)
class ScalarAdamPreconditionerConfig(ScalarRMSpropPreconditionerConfig):
    """As `ScalarRMSpropPreconditionerConfig`, with bias correction of v.

    Choose this as grafting to save Adam's second moment, which is as large as the parameters.

    Attributes:
        epsilon (float): Damping, positive. (Default: 1e-10)
        beta2 (float): Decay of v, in (0, 1]; 1 sums. (Default: 0.999)
    """

    beta2: float = 0.999


class ScalarAdagradPreconditionerList(AdagradPreconditionerList):
    """The base's AdaGrad list on the root mean squares of blocks.

        v ← beta2·v + w·mean(G²)
        U ← G / (√(v / bias_correction2) + epsilon)

    Works on blocks, whose v are of no dimension, and on pieces (K, *shape), with v of (K,).
    """

    @torch.no_grad()
    def update_preconditioners(
        self,
        masked_grad_list: Sequence[Tensor],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Accumulates the mean squares.

        Args:
            masked_grad_list: Gradients of the active blocks, or of pieces.
            step: Step count, a CPU tensor.
            perform_amortized_computation: Without meaning here.
        """
        means = tuple(map(_root_mean_square, masked_grad_list, self._masked_preconditioner_list))
        super().update_preconditioners(means, step, perform_amortized_computation)

    @torch.no_grad()
    def precondition(self, masked_grad_list: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients, each block multiplied by a number, in new memory.

        Args:
            masked_grad_list: (Filtered) gradients of the active blocks, or of pieces.

        Returns:
            Tensors of the same shapes and dtypes.
        """
        ones = tuple(map(torch.ones_like, self._masked_preconditioner_list))
        scales = super().precondition(ones)
        return tuple(
            grad * scale.view(*scale.shape, *[1] * (grad.dim() - scale.dim())).to(grad.dtype)
            for grad, scale in zip(masked_grad_list, scales, strict=True)
        )


def _root_mean_square(grad: Tensor, second_moment: Tensor) -> Tensor:
    """Of each block of a tensor, in the shape and dtype of its second moments."""
    rows = grad.reshape(*second_moment.shape, -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=second_moment.dtype)
    return norms / math.sqrt(max(rows.shape[-1], 1))


def scalar_list(
    config: ScalarAdaGradPreconditionerConfig, state: Any, distributor: Any
) -> ScalarAdagradPreconditionerList:
    """The list for a config, with its state.

    Args:
        config: Which of the three, and its options.
        state: The optimizer's, in which the second moments are kept.
        distributor: Of the group's blocks.

    Returns:
        The list.
    """
    beta2 = config.beta2 if isinstance(config, ScalarRMSpropPreconditionerConfig) else 1.0
    # Not the blocks but a number for each; in 16 bits a slow average would stand still.
    numbers = tuple(
        torch.empty((), dtype=torch.promote_types(block.dtype, torch.float32), device=block.device)
        for block in distributor.local_blocked_params
    )
    return ScalarAdagradPreconditionerList(
        block_list=numbers,
        state=state,
        block_info_list=distributor.local_block_info_list,
        beta2=beta2,
        weighting_factor=1.0 if beta2 == 1.0 else 1 - beta2,
        epsilon=config.epsilon,
        use_bias_correction=isinstance(config, ScalarAdamPreconditionerConfig),
    )
