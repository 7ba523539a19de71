"""Shampoo's preconditioners of a parameter group, block by block."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.blocking import pack_upper_triangular, unpack_upper_triangular
from dash_shampoo.base.embedded.configs import RootInvShampooPreconditionerConfig
from dash_shampoo.base.embedded.distributor import BlockInfo
from dash_shampoo.base.embedded.matrix_function_configs import RootInvConfig
from dash_shampoo.base.embedded.matrix_functions import check_supported, matrix_inverse_root
from dash_shampoo.base.embedded.preconditioner_list import (
    PreconditionerList,
    PreconditionerValueError,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class RootInvShampooKroneckerFactors:
    """The factor matrices of a block and their inverse roots, as local tensors.

    Attributes:
        factor_matrices: One (N, N) per preconditioned dimension, or packed (N(N+1)/2,).
        inv_factor_matrices: Their inverse roots, stored alike.
        factor_matrix_indices: "<parameter>.<block>.<number>" for messages.
        roots: p of A^(-1/p) for each.
        use_symmetric_packing: Whether the matrices are packed.
        amortized_computation_config: The solver.
        epsilon: Damping.
        num_tolerated_failed_amortized_computations: How many failures in a row are tolerated.
        use_trace_scaling: Whether a factor is multiplied by trace^(-trace_scaling_exponent).
        trace_scaling_exponent: See there.
        param_name: Name of the parameter for messages. (Default: None)
    """

    factor_matrices: tuple[Tensor, ...]
    inv_factor_matrices: tuple[Tensor, ...]
    factor_matrix_indices: tuple[str, ...]
    roots: tuple[float, ...]
    use_symmetric_packing: bool
    amortized_computation_config: RootInvConfig
    epsilon: float
    num_tolerated_failed_amortized_computations: int
    use_trace_scaling: bool = False
    trace_scaling_exponent: float = 0.5
    param_name: str | None = None
    _failed_amortized_computation_counter: int = field(init=False, default=0)

    def get_unpacked_inv_factor_matrices(self) -> tuple[Tensor, ...]:
        """The inverse factor matrices as (N, N); new memory if they are packed."""
        if not self.use_symmetric_packing:
            return self.inv_factor_matrices
        return tuple(map(unpack_upper_triangular, self.inv_factor_matrices))

    def accumulate_(self, outer_products: list[Tensor], beta2: float, weight: float) -> None:
        """F ← beta2·F + weight·GGᵀ."""
        if self.use_symmetric_packing:
            outer_products = list(map(pack_upper_triangular, outer_products))
        if beta2 != 1.0:
            torch._foreach_mul_(self.factor_matrices, beta2)
        torch._foreach_add_(self.factor_matrices, outer_products, alpha=weight)

    def amortized_computation(self, bias_correction2: float | Tensor) -> None:
        """R ← (F / bias_correction2)^(-1/p); where the solver fails, R stays.

        Args:
            bias_correction2: What F is divided by.

        Raises:
            PreconditionerValueError: If a factor matrix or its inverse root is not finite.
            ValueError: If the solver failed more often in a row than tolerated.
        """
        last_error: Exception | None = None
        for factor, inverse, index, root in zip(
            self.factor_matrices,
            self.inv_factor_matrices,
            self.factor_matrix_indices,
            self.roots,
            strict=True,
        ):
            matrix = self._prepared(factor, bias_correction2)
            if not torch.isfinite(matrix).all():
                raise PreconditionerValueError(
                    f"Encountered nan or inf values in factor matrix {self._named(index)}. Check "
                    "the inputs of the model and the gradients for nan; if the training diverged, "
                    "decrease the learning rate or increase the epsilon of the grafting."
                )
            try:
                result = matrix_inverse_root(
                    matrix, Fraction(root), self.amortized_computation_config, self.epsilon
                )
            except (NotImplementedError, torch.OutOfMemoryError):
                raise
            except (ArithmeticError, RuntimeError, ValueError) as error:
                last_error = error
                logger.warning(
                    "The inverse root of factor matrix %s failed (%s); the previous one is kept.",
                    self._named(index),
                    error,
                )
                continue
            result = result.to(inverse.dtype)  # where it may overflow
            if not torch.isfinite(result).all():
                raise PreconditionerValueError(
                    f"Encountered nan or inf values in the inverse root of factor matrix "
                    f"{self._named(index)}. Increase epsilon={self.epsilon} or use EigenConfig."
                )
            inverse.copy_(pack_upper_triangular(result) if self.use_symmetric_packing else result)
        self._count_failure(last_error)

    def _prepared(self, factor: Tensor, bias_correction2: float | Tensor) -> Tensor:
        matrix = factor / bias_correction2
        if self.use_symmetric_packing:
            matrix = unpack_upper_triangular(matrix)
        if self.use_trace_scaling:
            # A trace that rounding made negative is clamped; arXiv 2506.03595.
            trace = matrix.trace().clamp(min=self.epsilon)
            matrix = matrix * trace.pow(-self.trace_scaling_exponent)
        return matrix

    def _count_failure(self, error: Exception | None) -> None:
        if error is None:
            self._failed_amortized_computation_counter = 0
            return
        self._failed_amortized_computation_counter += 1
        tolerated = self.num_tolerated_failed_amortized_computations
        if self._failed_amortized_computation_counter > tolerated:
            raise ValueError(
                f"The inverse roots of the factor matrices {self.factor_matrix_indices} failed "
                f"{self._failed_amortized_computation_counter} times in a row, and "
                f"num_tolerated_failed_amortized_computations={tolerated}. The last error: {error}"
            ) from error

    def _named(self, index: str) -> str:
        return index if self.param_name is None else f"{index} (of parameter {self.param_name})"


def _identity(size: int, is_packed: bool, device: torch.device) -> Tensor:
    identity = torch.eye(size, device=device)
    return pack_upper_triangular(identity) if is_packed else identity


class RootInvShampooPreconditionerList(PreconditionerList):
    """Shampoo with stored inverse roots, one block after the other (arXiv 2309.06497).

        F_k ← beta2·F_k + weighting_factor·G₍ₖ₎G₍ₖ₎ᵀ      G₍ₖ₎ the mode-k unfolding
        R_k ← (F_k / bias_correction2)^(-1/p_k)           every precondition_frequency steps
        U ← G ×₁ R_1 ×₂ R_2 …

    Args:
        block_list: The blocks of this process.
        state: The optimizer's state, in which the matrices are kept.
        block_info_list: One per block.
        preconditioner_config: Solver, dtypes, exponents, packing.
        beta2: Decay of the factors; 1.0 sums.
        weighting_factor: Weight of the new outer products.
        epsilon: Damping.
        use_bias_correction: Whether bias_correction2 = 1 - beta2^step instead of 1.
    """

    def __init__(
        self,
        block_list: tuple[Tensor, ...],
        state: Mapping[Tensor, Any],
        block_info_list: Sequence[BlockInfo],
        preconditioner_config: RootInvShampooPreconditionerConfig,
        beta2: float = 1.0,
        weighting_factor: float = 1.0,
        epsilon: float = 1e-12,
        use_bias_correction: bool = True,
    ) -> None:
        super().__init__(block_list)
        self._preconditioner_config = preconditioner_config
        self._beta2 = beta2
        self._weighting_factor = weighting_factor
        self._epsilon = epsilon
        self._use_bias_correction = use_bias_correction
        self._bias_correction2 = torch.tensor(1.0)

        self._local_order_list: tuple[int, ...] = tuple(block.dim() for block in block_list)
        self._local_preconditioned_dims_selector_list: tuple[tuple[bool, ...], ...] = tuple(
            tuple(self._exponent(k, len(dims)) != 0.0 for k in range(len(dims)))
            for dims in self._dims_list
        )
        identity = cache(_identity)  # one for all blocks: thousands cost seconds
        self._local_kronecker_factors_unwrapped: tuple[RootInvShampooKroneckerFactors, ...] = tuple(
            self._allocate(block, info, selector, state, identity)
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

    def check_supported(self) -> None:
        """Refuses a solver that this list does not have, or roots that it cannot do.

        Raises:
            NotImplementedError: If there is no such solver.
            ValueError: If the solver cannot do a root.
        """
        config = self._preconditioner_config.amortized_computation_config
        check_supported(config)
        roots = {r for factors in self._local_kronecker_factors_unwrapped for r in factors.roots}
        for root in sorted(roots):
            check_supported(config, root)

    def update_preconditioners(
        self,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Accumulates the factor matrices and, when due, refreshes their inverse roots.

        Args:
            masked_grad_list: Gradients of the active blocks.
            step: Step count, a CPU tensor.
            perform_amortized_computation: Whether the inverse roots are due.

        Raises:
            PreconditionerValueError: If a factor matrix or its inverse root is not finite.
            ValueError: If the solver failed more often in a row than tolerated.
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

    def precondition(self, masked_grad_list: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """U = G ×₁ R_1 ×₂ R_2 … of the active blocks, in new memory and of the same dtypes."""
        return tuple(
            self._precondition_block(grad, selector, factors)
            for grad, selector, factors in zip(
                masked_grad_list,
                self._masked_preconditioned_dims_selector_list,
                self._masked_kronecker_factors_unwrapped,
                strict=True,
            )
        )

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

    @staticmethod
    def _precondition_block(
        grad: Tensor, selector: tuple[bool, ...], factors: RootInvShampooKroneckerFactors
    ) -> Tensor:
        if not any(selector):
            return grad.clone()
        inverses = iter(factors.get_unpacked_inv_factor_matrices())
        # Every dimension in turn is taken from the front and put at the back, so that the order of
        # the dimensions is the original one at the end.
        result = grad
        for is_preconditioned in selector:
            if is_preconditioned:
                inverse = next(inverses)
                result = torch.tensordot(result.to(inverse.dtype), inverse, dims=([0], [0]))
            else:
                result = result.movedim(0, -1)
        return result.to(grad.dtype)

    def _exponent(self, dimension: int, order: int) -> float:
        default = 1 / (2 * max(order, 1))
        override = self._preconditioner_config.inverse_exponent_override.get(order, default)
        return override.get(dimension, default) if isinstance(override, dict) else override

    def _allocate(
        self,
        block: Tensor,
        info: BlockInfo,
        selector: tuple[bool, ...],
        state: Mapping[Tensor, Any],
        identity: Callable[[int, bool, torch.device], Tensor],
    ) -> RootInvShampooKroneckerFactors:
        config = self._preconditioner_config
        dimensions = tuple(compress(range(block.dim()), selector))
        sizes = [block.shape[k] for k in dimensions]

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            shape = (size * (size + 1) // 2,) if config.use_symmetric_packing else (size, size)
            return info.allocate_zeros_tensor(size=shape, dtype=dtype, device=block.device)

        factor_matrices = [zeros(size, config.factor_matrix_dtype) for size in sizes]
        inv_factor_matrices = [zeros(size, config.inv_factor_matrix_dtype) for size in sizes]
        for size, inverse in zip(sizes, map(info.get_tensor, inv_factor_matrices), strict=True):
            inverse.copy_(identity(size, config.use_symmetric_packing, inverse.device))
        block_state = info.block_state(state)
        block_state[keys.SHAMPOO] = {
            name: dict(enumerate(matrices))
            for name, matrices in (
                (keys.FACTOR_MATRICES, factor_matrices),
                (keys.INV_FACTOR_MATRICES, inv_factor_matrices),
            )
            if matrices
        }
        param_index, block_key = info.composable_block_ids
        return RootInvShampooKroneckerFactors(
            factor_matrices=tuple(map(info.get_tensor, factor_matrices)),
            inv_factor_matrices=tuple(map(info.get_tensor, inv_factor_matrices)),
            factor_matrix_indices=tuple(
                f"{param_index}.{block_key}.{n}" for n in range(len(sizes))
            ),
            roots=tuple(1 / self._exponent(k, block.dim()) for k in dimensions),
            use_symmetric_packing=config.use_symmetric_packing,
            amortized_computation_config=config.amortized_computation_config,
            epsilon=self._epsilon,
            num_tolerated_failed_amortized_computations=(
                config.num_tolerated_failed_amortized_computations
            ),
            use_trace_scaling=config.use_trace_scaling,
            trace_scaling_exponent=config.trace_scaling_exponent,
            param_name=info.param_name,
        )
