"""Lists that `DashShampoo` computes on stacks: here they have their state and check their blocks.

The sequential optimizer of this base has inverse roots alone, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.configs import PreconditionerConfig
from dash_shampoo.base.embedded.kronecker_list import (
    Allocator,
    BaseShampooPreconditionerList,
    ClassicShampooPreconditionerList,
    KroneckerFactors,
)
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerList
from dash_shampoo.base.embedded.shampoo_list import RootInvShampooPreconditionerList


def _refuse(config: object) -> NoReturn:
    raise NotImplementedError(
        f"The embedded base's own optimizer computes inverse roots alone, not {config!r}: use "
        "dash_shampoo.DashShampoo, which computes it on stacks, or Meta's distributed_shampoo package."
    )


class _OnStacksAlone(PreconditionerList):
    """A list that a subclass has to compute."""

    _preconditioner_config: Any

    def check_supported(self) -> None:
        """Says that this list alone cannot step.

        Raises:
            NotImplementedError: Always.
        """
        _refuse(self._preconditioner_config)

    def precondition(self, masked_grad_list: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Refused, as by `check_supported`."""
        del masked_grad_list
        _refuse(self._preconditioner_config)


@dataclass(kw_only=True, eq=False)
class EigendecomposedShampooKroneckerFactors(KroneckerFactors):
    """The factor matrices of a block and their eigendecompositions, as local tensors.

    Attributes:
        factor_matrices_eigenvectors: (N, N), in columns; the identity at first.
        factor_matrices_eigenvalues: (N,); ones at first.
    """

    factor_matrices_eigenvectors: tuple[Tensor, ...]
    factor_matrices_eigenvalues: tuple[Tensor, ...]


class EigendecomposedShampooPreconditionerList(_OnStacksAlone, ClassicShampooPreconditionerList):
    """Shampoo with stored eigendecompositions."""

    _record = EigendecomposedShampooKroneckerFactors

    def _more_state(
        self, allocate: Allocator, shape: torch.Size, sizes: Sequence[int]
    ) -> dict[str, list[Tensor] | Tensor]:
        del shape
        config = self._preconditioner_config
        return {
            keys.EIGENVECTORS: [
                allocate.identity(size, config.factor_matrix_eigenvectors_dtype) for size in sizes
            ],
            keys.EIGENVALUES: [
                allocate.ones((size,), config.factor_matrix_eigenvalues_dtype) for size in sizes
            ],
        }


@dataclass(kw_only=True, eq=False)
class EigenvalueCorrectedShampooKroneckerFactors(KroneckerFactors):
    """The factor matrices of a block, their eigenvectors and its second moment, as local tensors.

    Attributes:
        factor_matrices_eigenvectors: (N, N), in columns; the identity at first.
        corrected_eigenvalues: Of the block's shape.
    """

    factor_matrices_eigenvectors: tuple[Tensor, ...]
    corrected_eigenvalues: Tensor


class EigenvalueCorrectedShampooPreconditionerList(_OnStacksAlone, BaseShampooPreconditionerList):
    """Adam in the eigenbasis of Shampoo's factors (SOAP)."""

    _record = EigenvalueCorrectedShampooKroneckerFactors

    def _selector(self, order: int) -> tuple[bool, ...]:
        ignored = self._preconditioner_config.ignored_basis_change_dims.get(order, [])
        return tuple(k not in ignored for k in range(order))

    def _roots(self, selector: tuple[bool, ...]) -> tuple[float, ...]:
        # The one of the corrected eigenvalues.
        return (1 / self._preconditioner_config.inverse_exponent_override.get(len(selector), 0.5),)

    def _more_state(
        self, allocate: Allocator, shape: torch.Size, sizes: Sequence[int]
    ) -> dict[str, list[Tensor] | Tensor]:
        config = self._preconditioner_config
        return {
            keys.EIGENVECTORS: [
                allocate.identity(size, config.factor_matrix_eigenvectors_dtype) for size in sizes
            ],
            keys.CORRECTED_EIGENVALUES: allocate.zeros(shape, config.corrected_eigenvalues_dtype),
        }


class RootInvKLShampooPreconditionerList(_OnStacksAlone, RootInvShampooPreconditionerList):
    """KL-Shampoo with stored inverse roots; the state is Shampoo's."""


class _StatelessList(_OnStacksAlone):
    """A list without state: the direction is a function of the gradient.

    Args:
        block_list: The blocks of this process.
        preconditioner_config: The function.
    """

    def __init__(
        self, block_list: tuple[Tensor, ...], preconditioner_config: PreconditionerConfig
    ) -> None:
        super().__init__(block_list)
        self._preconditioner_config = preconditioner_config

    def update_preconditioners(
        self,
        masked_grad_list: tuple[Tensor, ...],
        step: Tensor,
        perform_amortized_computation: bool = False,
    ) -> None:
        """Keeps nothing."""

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Keeps nothing."""


class SpectralDescentPreconditionerList(_StatelessList):
    """Orthogonalised gradients, of matrices alone."""


class SignDescentPreconditionerList(_StatelessList):
    """The signs of the gradients."""
