"""What all lists of the Shampoo family keep of a block: selection, state, factor matrices."""

from collections.abc import Mapping, Sequence
from itertools import compress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dash_shampoo.base.embedded import configs
from dash_shampoo.base.embedded.block_info import BlockInfo
from dash_shampoo.base.embedded.packing import pack, packed_diagonal
from dash_shampoo.base.embedded.preconditioner_list import PreconditionerList, Tensors


class KroneckerFactors(SimpleNamespace):
    """The factor matrices of a block and what is computed of them, as local tensors.

    Attributes:
        factor_matrices: One (N, N) per preconditioned dimension, or packed (N(N+1)/2,).
        factor_matrix_indices: "<parameter>.<block>.<number>" for messages.
        roots: p of A^(-1/p) for each; of eigenvalue correction the one of the second moment.
        selector: Which dimensions of the block have a factor matrix.
        use_symmetric_packing: Whether the matrices are packed.
        param_name: Name of the parameter for messages, or None.
        **tensors: What else the block's state has, under its keys: `inv_factor_matrices` (as the factor
            matrices), `factor_matrices_eigenvectors` (N, N), `factor_matrices_eigenvalues` (N,), each one
            per factor matrix; `corrected_eigenvalues`, of the block's shape.
    """

    factor_matrices: Tensors
    factor_matrix_indices: tuple[str, ...]
    roots: tuple[float, ...]
    selector: tuple[bool, ...]
    use_symmetric_packing: bool
    param_name: str | None
    inv_factor_matrices: Tensors
    _failed_amortized_computation_counter: int = 0


class BaseShampooPreconditionerList(PreconditionerList):
    """The factor matrices of a parameter group's blocks, one block after the other.

        F_k ← beta2·F_k + weighting_factor·G₍ₖ₎G₍ₖ₎ᵀ      G₍ₖ₎ the mode-k unfolding

    Blocks have the state of any config of the family; what is computed of it is up to subclasses.

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

    def __init__(
        self,
        block_list: Tensors,
        state: Mapping[Tensor, Any],
        block_info_list: Sequence[BlockInfo],
        preconditioner_config: configs.BaseShampooPreconditionerConfig,
        beta2: float = 1.0,
        weighting_factor: float = 1.0,
        epsilon: float = 1e-12,
        use_bias_correction: bool = True,
    ) -> None:
        super().__init__(block_list, preconditioner_config)
        self._beta2 = beta2
        self._weighting_factor = weighting_factor
        self._epsilon = epsilon
        self._use_bias_correction = use_bias_correction
        self._bias_correction2 = torch.tensor(1.0)
        self._local_kronecker_factors_unwrapped: tuple[KroneckerFactors, ...] = tuple(
            self._allocate(block, info, state)
            for block, info in zip(block_list, block_info_list, strict=True)
        )
        self._local_preconditioned_dims_selector_list = tuple(
            factors.selector for factors in self._local_kronecker_factors_unwrapped
        )
        self.compress_preconditioner_list((True,) * len(block_list))

    def update_preconditioners(
        self, masked_grad_list: Tensors, step: Tensor, perform_amortized_computation: bool = False
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
        is_sum = self._beta2 == 1.0 or self._preconditioner_config.drop_weighting_factor_on_gsquare
        if self._use_bias_correction and not is_sum:
            self._bias_correction2 = torch.tensor(1.0) - self._beta2**step
        if perform_amortized_computation:
            for factors in self._masked_kronecker_factors_unwrapped:
                self._amortized_computation(factors)

    def compress_preconditioner_list(self, local_grad_selector: tuple[bool, ...]) -> None:
        """Restricts the list to the blocks that have a gradient."""
        self._masked_kronecker_factors_unwrapped = tuple(
            compress(self._local_kronecker_factors_unwrapped, local_grad_selector)
        )

    def _update_factor_matrices(self, masked_grad_list: Tensors) -> None:
        active = zip(masked_grad_list, self._masked_kronecker_factors_unwrapped, strict=True)
        for grad, factors in active:
            if any(factors.selector):
                unfoldings = [
                    grad.movedim(k, 0).reshape(grad.shape[k], -1)
                    for k in compress(range(grad.dim()), factors.selector)
                ]
                products = [unfolded @ unfolded.T for unfolded in unfoldings]
                if factors.use_symmetric_packing:
                    products = list(map(pack, products))
                if self._beta2 != 1.0:
                    torch._foreach_mul_(factors.factor_matrices, self._beta2)
                torch._foreach_add_(factors.factor_matrices, products, alpha=self._weighting_factor)

    def _amortized_computation(self, factors: KroneckerFactors) -> None:
        """Computes of a block's factor matrices what is due; for lists that can."""

    # ------------------------------------------------------------- what depends on the config

    def _exponents_of(self, order: int) -> tuple[float, ...]:
        """For each dimension of a block its a in F^(-a); 0.0 where it has no factor matrix."""
        config = self._preconditioner_config
        if isinstance(config, configs.EigenvalueCorrectedShampooPreconditionerConfig):
            ignored = config.ignored_basis_change_dims.get(order, [])
            return tuple(float(k not in ignored) for k in range(order))
        default = 1 / (2 * max(order, 1))
        given: Any = config.inverse_exponent_override.get(order, default)
        by_dimension = given if isinstance(given, dict) else dict.fromkeys(range(order), given)
        return tuple(by_dimension.get(k, default) for k in range(order))

    def _roots(self, order: int) -> tuple[float, ...]:
        config = self._preconditioner_config
        if isinstance(config, configs.EigenvalueCorrectedShampooPreconditionerConfig):
            return (1 / config.inverse_exponent_override.get(order, 0.5),)
        return tuple(1 / exponent for exponent in self._exponents_of(order) if exponent != 0.0)

    def _allocate(
        self, block: Tensor, info: BlockInfo, state: Mapping[Tensor, Any]
    ) -> KroneckerFactors:
        selector = tuple(exponent != 0.0 for exponent in self._exponents_of(block.dim()))
        sizes = tuple(compress(block.shape, selector))
        tensors = self._tensors(block, info, sizes)
        info.block_state(state)["shampoo"] = {
            name: dict(enumerate(value)) if isinstance(value, list) else value
            for name, value in tensors.items()
            if isinstance(value, Tensor) or value
        }
        get: Any = info.get_tensor
        index = ".".join(map(str, info.composable_block_ids))
        return KroneckerFactors(
            **{
                name: tuple(map(get, value)) if isinstance(value, list) else get(value)
                for name, value in tensors.items()
            },
            factor_matrix_indices=tuple(f"{index}.{number}" for number in range(len(sizes))),
            roots=self._roots(block.dim()),
            selector=selector,
            use_symmetric_packing=self._preconditioner_config.use_symmetric_packing,
            param_name=info.param_name,
        )

    def _tensors(
        self, block: Tensor, info: BlockInfo, sizes: Sequence[int]
    ) -> dict[str, list[Tensor] | Tensor]:
        """The state of a block by key: one tensor for each factor matrix, or one in all."""
        config, device = self._preconditioner_config, block.device

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            shape = (size * (size + 1) // 2,) if config.use_symmetric_packing else (size, size)
            return info.allocate_zeros_tensor(shape, dtype, device)

        def identity(size: int, dtype: torch.dtype) -> Tensor:
            if not config.use_symmetric_packing:
                return info.allocate_eye_tensor(size, dtype, device)
            local = info.get_tensor(tensor := zeros(size, dtype))
            local.index_fill_(0, packed_diagonal(size, device), 1.0)
            return tensor

        tensors: dict[str, list[Tensor] | Tensor] = {
            "factor_matrices": [zeros(n, config.factor_matrix_dtype) for n in sizes]
        }
        if isinstance(config, configs.RootInvShampooPreconditionerConfig):
            dtype = config.inv_factor_matrix_dtype
            return {**tensors, "inv_factor_matrices": [identity(n, dtype) for n in sizes]}
        dtype = config.factor_matrix_eigenvectors_dtype  # eigenvectors are never packed
        tensors["factor_matrices_eigenvectors"] = [
            info.allocate_eye_tensor(n, dtype, device) for n in sizes
        ]
        if isinstance(config, configs.EigenvalueCorrectedShampooPreconditionerConfig):
            dtype = config.corrected_eigenvalues_dtype
            corrected = info.allocate_zeros_tensor(block.shape, dtype, device)
            return {**tensors, "corrected_eigenvalues": corrected}
        dtype = config.factor_matrix_eigenvalues_dtype
        ones = [info.allocate_ones_tensor((n,), dtype, device) for n in sizes]
        return {**tensors, "factor_matrices_eigenvalues": ones}
