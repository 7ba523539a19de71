"""Shampoo's preconditioners of a parameter group, block by block."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.kronecker_list import (
    Allocator,
    ClassicShampooPreconditionerList,
    KroneckerFactors,
)
from dash_shampoo.base.embedded.matrix_functions import check_supported, matrix_inverse_root
from dash_shampoo.base.embedded.packing import pack, unpack
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerValueError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class RootInvShampooKroneckerFactors(KroneckerFactors):
    """The factor matrices of a block and their inverse roots, as local tensors.

    Attributes:
        inv_factor_matrices: The inverse roots, stored as the factor matrices are.
    """

    inv_factor_matrices: tuple[Tensor, ...]

    def get_unpacked_inv_factor_matrices(self) -> tuple[Tensor, ...]:
        """The inverse factor matrices as (N, N); new memory if they are packed."""
        if not self.use_symmetric_packing:
            return self.inv_factor_matrices
        return tuple(map(unpack, self.inv_factor_matrices))

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
                    matrix, Fraction(root), self.config.amortized_computation_config, self.epsilon
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
            inverse.copy_(pack(result) if self.use_symmetric_packing else result)
        self._count_failure(last_error)

    def _prepared(self, factor: Tensor, bias_correction2: float | Tensor) -> Tensor:
        matrix = factor / bias_correction2
        if self.use_symmetric_packing:
            matrix = unpack(matrix)
        if self.config.use_trace_scaling:
            # A trace that rounding made negative is clamped; arXiv 2506.03595.
            trace = matrix.trace().clamp(min=self.epsilon)
            matrix = matrix * trace.pow(-self.config.trace_scaling_exponent)
        return matrix

    def _count_failure(self, error: Exception | None) -> None:
        if error is None:
            self._failed_amortized_computation_counter = 0
            return
        self._failed_amortized_computation_counter += 1
        tolerated = self.config.num_tolerated_failed_amortized_computations
        if self._failed_amortized_computation_counter > tolerated:
            raise ValueError(
                f"The inverse roots of the factor matrices {self.factor_matrix_indices} failed "
                f"{self._failed_amortized_computation_counter} times in a row, and "
                f"num_tolerated_failed_amortized_computations={tolerated}. The last error: {error}"
            ) from error

    def _named(self, index: str) -> str:
        return index if self.param_name is None else f"{index} (of parameter {self.param_name})"


class RootInvShampooPreconditionerList(ClassicShampooPreconditionerList):
    """Shampoo with stored inverse roots, one block after the other (arXiv 2309.06497).

    F_k ← beta2·F_k + weighting_factor·G₍ₖ₎G₍ₖ₎ᵀ      G₍ₖ₎ the mode-k unfolding
    R_k ← (F_k / bias_correction2)^(-1/p_k)           every precondition_frequency steps
    U ← G ×₁ R_1 ×₂ R_2 …
    """

    _record = RootInvShampooKroneckerFactors

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

    def _more_state(
        self, allocate: Allocator, shape: torch.Size, sizes: Sequence[int]
    ) -> dict[str, list[Tensor] | Tensor]:
        del shape
        dtype = self._preconditioner_config.inv_factor_matrix_dtype
        return {
            keys.INV_FACTOR_MATRICES: [allocate.symmetric_identity(size, dtype) for size in sizes]
        }
