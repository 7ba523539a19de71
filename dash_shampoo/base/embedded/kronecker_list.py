"""What all lists of the Shampoo family keep of a block: selection, state, factor matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.configs import BaseShampooPreconditionerConfig
from dash_shampoo.base.embedded.packing import pack, packed_diagonal
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerList


@dataclass(kw_only=True, eq=False)
class KroneckerFactors:
    """The factor matrices of a block, as local tensors.

    Attributes:
        factor_matrices: One (N, N) per preconditioned dimension, or packed (N(N+1)/2,).
        factor_matrix_indices: "<parameter>.<block>.<number>" for messages.
        roots: p of A^(-1/p) for each.
        config: How they are kept, and what is computed of them now and then.
        epsilon: Damping.
        param_name: Name of the parameter for messages. (Default: None)
    """

    factor_matrices: tuple[Tensor, ...]
    factor_matrix_indices: tuple[str, ...]
    roots: tuple[float, ...]
    config: Any
    epsilon: float
    param_name: str | None = None
    _failed_amortized_computation_counter: int = field(init=False, default=0)

    @property
    def use_symmetric_packing(self) -> bool:
        """Whether the matrices are packed."""
        return bool(self.config.use_symmetric_packing)

    def accumulate_(self, outer_products: list[Tensor], beta2: float, weight: float) -> None:
        """F ← beta2·F + weight·GGᵀ."""
        if self.use_symmetric_packing:
            outer_products = list(map(pack, outer_products))
        if beta2 != 1.0:
            torch._foreach_mul_(self.factor_matrices, beta2)
        torch._foreach_add_(self.factor_matrices, outer_products, alpha=weight)


class Allocator:
    """Allocates the state of one block.

    Args:
        block: The block.
        info: Where its state belongs.
        use_symmetric_packing: Whether symmetric matrices are packed.
    """

    def __init__(self, block: Tensor, info: BlockInfo, use_symmetric_packing: bool) -> None:
        self._device = block.device
        self._info = info
        self._is_packed = use_symmetric_packing

    def zeros(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros of a shape."""
        return self._info.allocate_zeros_tensor(size=size, dtype=dtype, device=self._device)

    def ones(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Ones of a shape."""
        return self._info.allocate_ones_tensor(size=size, dtype=dtype, device=self._device)

    def identity(self, size: int, dtype: torch.dtype) -> Tensor:
        """An N×N identity that is never packed."""
        return self._info.allocate_eye_tensor(n=size, dtype=dtype, device=self._device)

    def symmetric_zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """An N×N matrix of zeros, packed where symmetric matrices are."""
        return self.zeros((size * (size + 1) // 2,) if self._is_packed else (size, size), dtype)

    def symmetric_identity(self, size: int, dtype: torch.dtype) -> Tensor:
        """An N×N identity, packed where symmetric matrices are."""
        if not self._is_packed:
            return self.identity(size, dtype)
        tensor = self.symmetric_zeros(size, dtype)
        local = self._info.get_tensor(tensor)
        local.index_fill_(0, packed_diagonal(size, local.device), 1.0)
        return tensor


class BaseShampooPreconditionerList(PreconditionerList):
    """The factor matrices of a parameter group's blocks, one block after the other.

        F_k ← beta2·F_k + weighting_factor·G₍ₖ₎G₍ₖ₎ᵀ      G₍ₖ₎ the mode-k unfolding

    Args:
        block_list: The blocks of this process.
        state: The optimizer's state, in which the matrices are kept.
        block_info_list: One per block.
        preconditioner_config: Matrix function, dtypes, exponents, packing.
        beta2: Decay of the factors; 1.0 sums.
        weighting_factor: Weight of the new outer products.
        epsilon: Damping.
        use_bias_correction: Whether bias_correction2 = 1 - beta2^step instead of 1.
    """

    _record: ClassVar[type[KroneckerFactors]]

    def __init__(
        self,
        block_list: tuple[Tensor, ...],
        state: Mapping[Tensor, Any],
        block_info_list: Sequence[BlockInfo],
        preconditioner_config: BaseShampooPreconditionerConfig,
        beta2: float = 1.0,
        weighting_factor: float = 1.0,
        epsilon: float = 1e-12,
        use_bias_correction: bool = True,
    ) -> None:
        super().__init__(block_list)
        self._preconditioner_config: Any = preconditioner_config
        self._beta2 = beta2
        self._weighting_factor = weighting_factor
        self._epsilon = epsilon
        self._use_bias_correction = use_bias_correction
        self._bias_correction2 = torch.tensor(1.0)

        self._local_order_list: tuple[int, ...] = tuple(block.dim() for block in block_list)
        self._local_preconditioned_dims_selector_list: tuple[tuple[bool, ...], ...] = tuple(
            self._selector(len(dims)) for dims in self._dims_list
        )
        self._local_kronecker_factors_unwrapped: tuple[Any, ...] = tuple(
            self._allocate(block, info, selector, state)
            for block, info, selector in zip(
                block_list,
                block_info_list,
                self._local_preconditioned_dims_selector_list,
                strict=True,
            )
        )
        self._masked_order_list = self._local_order_list
        self._masked_preconditioned_dims_selector_list = (
            self._local_preconditioned_dims_selector_list
        )
        self._masked_kronecker_factors_unwrapped = self._local_kronecker_factors_unwrapped

    # ---------------------------------------------------------------- what each list defines

    @abstractmethod
    def _selector(self, order: int) -> tuple[bool, ...]:
        """Which dimensions of a block of this order have a factor matrix."""

    @abstractmethod
    def _roots(self, selector: tuple[bool, ...]) -> tuple[float, ...]:
        """The roots of a block with this selection of dimensions."""

    @abstractmethod
    def _more_state(
        self, allocate: Allocator, shape: torch.Size, sizes: Sequence[int]
    ) -> dict[str, list[Tensor] | Tensor]:
        """The state beside the factor matrices, by key: one tensor for each of them, or one in all."""

    # ----------------------------------------------------------------------------- the step

    def update_preconditioners(
        self,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Accumulates the factor matrices and, when due, performs the amortized computation.

        Args:
            masked_grad_list: Gradients of the active blocks.
            step: Step count, a CPU tensor.
            perform_amortized_computation: Whether it is due.

        Raises:
            PreconditionerValueError: If a factor matrix or what is computed of it is not finite.
            ValueError: If the computation failed more often in a row than tolerated.
        """
        self._update_factor_matrices(masked_grad_list)
        if (
            self._use_bias_correction
            and self._beta2 < 1.0
            and not self._preconditioner_config.drop_weighting_factor_on_gsquare
        ):
            self._bias_correction2 = torch.tensor(1.0) - self._beta2**step
        if perform_amortized_computation:
            for factors in self._masked_kronecker_factors_unwrapped:
                factors.amortized_computation(self._bias_correction2)

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""
        self._masked_order_list = tuple(compress(self._local_order_list, local_grad_selector))
        self._masked_preconditioned_dims_selector_list = tuple(
            compress(self._local_preconditioned_dims_selector_list, local_grad_selector)
        )
        self._masked_kronecker_factors_unwrapped = tuple(
            compress(self._local_kronecker_factors_unwrapped, local_grad_selector)
        )

    def _update_factor_matrices(self, masked_grad_list: tuple[Tensor, ...]) -> None:
        for grad, selector, factors in zip(
            masked_grad_list,
            self._masked_preconditioned_dims_selector_list,
            self._masked_kronecker_factors_unwrapped,
            strict=True,
        ):
            if not factors.factor_matrices:
                continue
            unfoldings = [
                grad.movedim(k, 0).reshape(grad.shape[k], -1)
                for k in compress(range(grad.dim()), selector)
            ]
            factors.accumulate_(
                [unfolded @ unfolded.T for unfolded in unfoldings],
                self._beta2,
                self._weighting_factor,
            )

    def _allocate(
        self,
        block: Tensor,
        info: BlockInfo,
        selector: tuple[bool, ...],
        state: Mapping[Tensor, Any],
    ) -> KroneckerFactors:
        config = self._preconditioner_config
        sizes = list(compress(block.shape, selector))
        allocate = Allocator(block, info, config.use_symmetric_packing)
        tensors: dict[str, list[Tensor] | Tensor] = {
            keys.FACTOR_MATRICES: [
                allocate.symmetric_zeros(size, config.factor_matrix_dtype) for size in sizes
            ],
            **self._more_state(allocate, block.shape, sizes),
        }
        info.block_state(state)[keys.SHAMPOO] = {
            name: dict(enumerate(value)) if isinstance(value, list) else value
            for name, value in tensors.items()
            if isinstance(value, Tensor) or value
        }
        param_index, block_key = info.composable_block_ids
        local: dict[str, Any] = {
            name: tuple(map(info.get_tensor, value))
            if isinstance(value, list)
            else info.get_tensor(value)
            for name, value in tensors.items()
        }
        return self._record(
            **local,
            factor_matrix_indices=tuple(
                f"{param_index}.{block_key}.{n}" for n in range(len(sizes))
            ),
            roots=self._roots(selector),
            config=config,
            epsilon=self._epsilon,
            param_name=info.param_name,
        )


class ClassicShampooPreconditionerList(BaseShampooPreconditionerList):
    """A list with an exponent for every dimension, by `inverse_exponent_override`."""

    def _selector(self, order: int) -> tuple[bool, ...]:
        return tuple(self._exponent(k, order) != 0.0 for k in range(order))

    def _roots(self, selector: tuple[bool, ...]) -> tuple[float, ...]:
        order = len(selector)
        return tuple(1 / self._exponent(k, order) for k in compress(range(order), selector))

    def _exponent(self, dimension: int, order: int) -> float:
        default = 1 / (2 * max(order, 1))
        override: Any = self._preconditioner_config.inverse_exponent_override.get(order, default)
        exponent: float = (
            override.get(dimension, default) if isinstance(override, dict) else override
        )
        return exponent
