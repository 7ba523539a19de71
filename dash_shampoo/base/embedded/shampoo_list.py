"""Shampoo's preconditioners of a parameter group, block by block."""

import logging
from fractions import Fraction

import torch
from torch import Tensor

from dash_shampoo.base.embedded.kronecker_list import (
    BaseShampooPreconditionerList,
    KroneckerFactors,
)
from dash_shampoo.base.embedded.matrix_functions import check_supported, matrix_inverse_root
from dash_shampoo.base.embedded.packing import pack, unpack
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerValueError, Tensors

logger = logging.getLogger(__name__)


class RootInvShampooPreconditionerList(BaseShampooPreconditionerList):
    """Shampoo with stored inverse roots, one block after the other (arXiv 2309.06497).

    F_k ← beta2·F_k + weighting_factor·G₍ₖ₎G₍ₖ₎ᵀ      G₍ₖ₎ the mode-k unfolding
    R_k ← (F_k / bias_correction2)^(-1/p_k)           every precondition_frequency steps
    U ← G ×₁ R_1 ×₂ R_2 …
    """

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

    def precondition(self, masked_grad_list: Tensors) -> Tensors:
        """U = G ×₁ R_1 ×₂ R_2 … of the active blocks, in new memory and of the same dtypes."""
        active = zip(masked_grad_list, self._masked_kronecker_factors_unwrapped, strict=True)
        return tuple(_preconditioned(grad, factors) for grad, factors in active)

    def _amortized_computation(self, factors: KroneckerFactors) -> None:
        """R ← (F / bias_correction2)^(-1/p) of a block; where the solver fails, R stays."""
        last_error: Exception | None = None
        for factor, inverse, index, root in zip(
            factors.factor_matrices,
            factors.inv_factor_matrices,
            factors.factor_matrix_indices,
            factors.roots,
            strict=True,
        ):
            named = f"{index} (of parameter {factors.param_name})" if factors.param_name else index
            matrix = self._prepared(unpack(factor) if factors.use_symmetric_packing else factor)
            if not torch.isfinite(matrix).all():
                raise PreconditionerValueError(
                    f"Encountered nan or inf values in factor matrix {named}. Check the inputs of the "
                    "model and the gradients for nan; if the training diverged, decrease the learning "
                    "rate or increase the epsilon of the grafting."
                )
            solver = self._preconditioner_config.amortized_computation_config
            try:
                result = matrix_inverse_root(matrix, Fraction(root), solver, self._epsilon)
            except (NotImplementedError, torch.OutOfMemoryError):
                raise
            except (ArithmeticError, RuntimeError, ValueError) as error:
                last_error = error
                logger.warning(
                    "The inverse root of factor matrix %s failed (%s); the previous one is kept.",
                    named,
                    error,
                )
                continue
            result = result.to(inverse.dtype)  # where it may overflow
            if not torch.isfinite(result).all():
                raise PreconditionerValueError(
                    f"Encountered nan or inf values in the inverse root of factor matrix {named}. "
                    f"Increase epsilon={self._epsilon} or use EigenConfig."
                )
            inverse.copy_(pack(result) if factors.use_symmetric_packing else result)
        self._count_failure(factors, last_error)

    def _prepared(self, factor: Tensor) -> Tensor:
        matrix = factor / self._bias_correction2
        if self._preconditioner_config.use_trace_scaling:
            # A trace that rounding made negative is clamped; arXiv 2506.03595.
            trace = matrix.trace().clamp(min=self._epsilon)
            matrix = matrix * trace.pow(-self._preconditioner_config.trace_scaling_exponent)
        return matrix

    def _count_failure(self, factors: KroneckerFactors, error: Exception | None) -> None:
        failures = 0 if error is None else factors._failed_amortized_computation_counter + 1
        factors._failed_amortized_computation_counter = failures
        tolerated = self._preconditioner_config.num_tolerated_failed_amortized_computations
        if failures > tolerated:
            raise ValueError(
                f"The inverse roots of the factor matrices {factors.factor_matrix_indices} failed "
                f"{failures} times in a row, and "
                f"num_tolerated_failed_amortized_computations={tolerated}. The last error: {error}"
            ) from error


def _preconditioned(grad: Tensor, factors: KroneckerFactors) -> Tensor:
    if not any(factors.selector):
        return grad.clone()
    inverses = iter(factors.inv_factor_matrices)
    # Every dimension in turn is taken from the front and put at the back, so that the order of the
    # dimensions is the original one at the end.
    result = grad
    for is_preconditioned in factors.selector:
        if is_preconditioned:
            inverse = next(inverses)
            if factors.use_symmetric_packing:
                inverse = unpack(inverse)
            result = torch.tensordot(result.to(inverse.dtype), inverse, dims=([0], [0]))
        else:
            result = result.movedim(0, -1)
    return result.to(grad.dtype)
