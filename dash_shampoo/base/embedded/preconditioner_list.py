"""Preconditioners of a parameter group's blocks: the interface, SGD and the AdaGrad family."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.distributed_configs import not_implemented

Tensors: TypeAlias = tuple[Tensor, ...]


class PreconditionerValueError(ValueError):
    """A factor matrix or its inverse root is not finite."""


def divisor_of(bias_correction: Tensor) -> Any:
    """A bias correction, a scalar tensor, as the operand of a foreach operator; None once it is 1.

    A Python number lets the operators fuse on every device. Under `torch.compile` it would be compiled
    in as a constant, and where the step count is the device's, reading it would wait: there the tensor
    stays.
    """
    if torch.compiler.is_compiling() or bias_correction.device.type != "cpu":
        return bias_correction
    divisor = bias_correction.item()
    return None if divisor == 1.0 else divisor


class PreconditionerList:
    """Preconditioners of a list of blocks; by itself one without state that only `DashShampoo` computes.

    Args:
        block_list: The blocks of this process.
        preconditioner_config: What is computed. (Default: None)
    """

    def __init__(self, block_list: Tensors, preconditioner_config: object = None) -> None:
        self._dims_list: tuple[torch.Size, ...] = tuple(block.size() for block in block_list)
        self._preconditioner_config: Any = preconditioner_config

    def update_preconditioners(
        self, masked_grad_list: Tensors, step: Tensor, perform_amortized_computation: bool = False
    ) -> None:
        """Takes the gradients of the active blocks in."""

    def precondition(self, masked_grad_list: Tensors) -> Tensors:
        """The preconditioned gradients of the active blocks; never the given tensors' memory."""
        computed = (
            f"{self._preconditioner_config!r}, which dash_shampoo.DashShampoo computes on stacks,"
        )
        raise not_implemented(computed)

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""

    def check_supported(self) -> None:
        """Refuses what the list, once built, finds that it cannot do.

        Raises:
            NotImplementedError: If it lacks the method.
            ValueError: If the method cannot do what is asked for.
        """
        self.precondition(())


class SGDPreconditionerList(PreconditionerList):
    """The identity."""

    def precondition(self, masked_grad_list: Tensors) -> Tensors:
        """Copies of the gradients."""
        return tuple(grad.clone() for grad in masked_grad_list)


class AdagradPreconditionerList(PreconditionerList):
    """G / (sqrt(V / bias_correction2) + epsilon) with V ← beta2·V + weighting_factor·G².

    Args:
        block_list: The blocks of this process.
        state: The optimizer's state, in which V is kept.
        block_info_list: One per block.
        beta2: Decay of V; 1.0 sums.
        weighting_factor: Weight of the new G².
        epsilon: Damping.
        use_bias_correction: Whether bias_correction2 = 1 - beta2^step instead of 1.
    """

    def __init__(
        self,
        block_list: Tensors,
        state: Mapping[Tensor, Any],
        block_info_list: Sequence[BlockInfo],
        beta2: float = 1.0,
        weighting_factor: float = 1.0,
        epsilon: float = 1e-10,
        use_bias_correction: bool = True,
    ) -> None:
        super().__init__(block_list)
        self._beta2 = beta2
        self._weighting_factor = weighting_factor
        self._epsilon = epsilon
        self._use_bias_correction = use_bias_correction
        self._bias_correction2 = torch.tensor(1.0)
        self._local_preconditioner_list: Tensors = tuple(
            info.add_zeros_like(block, state, "adagrad")
            for block, info in zip(block_list, block_info_list, strict=True)
        )
        self._masked_preconditioner_list = self._local_preconditioner_list

    def update_preconditioners(
        self, masked_grad_list: Tensors, step: Tensor, perform_amortized_computation: bool = False
    ) -> None:
        """V ← beta2·V + weighting_factor·G²."""
        moments, grads = self._masked_preconditioner_list, masked_grad_list
        if grads:
            if self._beta2 != 1.0:
                torch._foreach_mul_(moments, self._beta2)
            torch._foreach_addcmul_(moments, grads, grads, value=self._weighting_factor)
        if self._use_bias_correction and self._beta2 < 1.0:
            self._bias_correction2 = torch.tensor(1.0) - self._beta2**step

    def precondition(self, masked_grad_list: Tensors) -> Tensors:
        """G / (sqrt(V) / sqrt(bias_correction2) + epsilon)."""
        if not masked_grad_list:
            return ()
        denominators = torch._foreach_sqrt(self._masked_preconditioner_list)
        if (divisor := divisor_of(self._bias_correction2.double().sqrt())) is not None:
            torch._foreach_div_(denominators, divisor)
        torch._foreach_add_(denominators, self._epsilon)
        return tuple(torch._foreach_div(masked_grad_list, denominators))

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""
        self._masked_preconditioner_list = tuple(
            compress(self._local_preconditioner_list, local_grad_selector)
        )
