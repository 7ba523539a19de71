"""What an inverse root costs, counted while the solver runs on a small matrix.

N: size of a factor matrix; K: number of columns of a tall operand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dash_shampoo.base import (
    EigendecompositionConfig,
    NewtonSchulzOrthogonalizationConfig,
    OrthogonalizationConfig,
    QREigendecompositionConfig,
    RootInvConfig,
    SVDOrthogonalizationConfig,
)
from dash_shampoo.eigenbasis import OrthogonalIterationConfig
from dash_shampoo.inverse_root import MinimaxConfig, num_products
from dash_shampoo.orthogonalization import GramOrthogonalizationConfig, MinimaxPolarConfig

REFERENCE_CONDITION_NUMBER = 1e6
"""Solvers with a stopping rule are counted on eigenvalues spread evenly, in their logarithm, over
this range: about what the factor matrices of a training have with a relative damping of 1e-6."""

_WELL_CONDITIONED = 10.0
# Golub and Van Loan, Matrix Computations, 4th edition, section 8.3.3: the symmetric QR algorithm with
# accumulated eigenvectors.
_EIGENDECOMPOSITION_FLOPS_PER_CUBE = 9.0

# Passes that rounding the operands of a product takes on a device where it is not done inside of the product;
# the CPU, which emulates it, takes others.
_ROUNDING_PASSES = {"fp16": 1.0, "bf16": 1.0, "fp16x3": 12.0}


@dataclass(frozen=True)
class SolverCost:
    """The cost of one inverse root of an N×N factor matrix, for any N.

    Attributes:
        num_matmuls: N×N by N×N products.
        num_symmetric_matmuls: Those of a matrix by itself.
        num_columns: Sum of K over products of N×N by N×K.
        num_eigendecompositions: Calls of `torch.linalg.eigh` per matrix.
        num_moved: N×N matrices that products read and write.
        num_passes: N×N matrices that everything else goes over.
        depends_on_data: Whether a stopping rule decides, so that the numbers hold for
            `REFERENCE_CONDITION_NUMBER` only.
    """

    num_matmuls: float = 0.0
    num_symmetric_matmuls: float = 0.0
    num_columns: float = 0.0
    num_eigendecompositions: float = 0.0
    num_moved: float = 0.0
    num_passes: float = 0.0
    depends_on_data: bool = False

    def matmul_flops(self, size: int) -> float:
        """2N³ for each square product and 2N²K for each tall one."""
        return 2.0 * size**2 * (self.num_matmuls * size + self.num_columns)

    def eigendecomposition_flops(self, size: int) -> float:
        """About 9N³ for each, little of it in matmuls."""
        return _EIGENDECOMPOSITION_FLOPS_PER_CUBE * self.num_eigendecompositions * size**3

    def elements_moved(self, size: int) -> float:
        """Elements read and written: by products, 2N² by a pass, 3N² by an eigendecomposition."""
        matrices = self.num_moved + 2 * self.num_passes + 3 * self.num_eigendecompositions
        return matrices * size**2 + 2 * self.num_columns * size


def measure_solver(
    config: RootInvConfig,
    root: float,
    epsilon: float,
    dtype: torch.dtype,
    residual_threshold: float | None = None,
) -> SolverCost:
    """Counts a solver's operations by running it on a small matrix of known spectrum on the CPU.

    Squares are those of a device that has our kernels, and so is what goes over the matrices beside them.

    Args:
        config: The solver.
        root: p of A^(-1/p).
        epsilon: The damping, as in training.
        dtype: Dtype of the factor matrices.
        residual_threshold: Of the test that each root is put to. Default: none.

    Returns:
        The cost of one matrix.

    Raises:
        ValueError: If there is no solver for the config or it cannot do the root.

    Examples:
        >>> from dash_shampoo import NewtonDBConfig
        >>> cost = measure_solver(NewtonDBConfig(), 4, 0.0, torch.float32)
        >>> cost.matmul_flops(1024) == 2 * 1024**3 * cost.num_matmuls, cost.depends_on_data
        (True, False)
    """
    counted: Any = config
    precision = getattr(config, "matmul_precision", "fp32")
    rounding = 0.0
    # All products of minimax are squares, whose operands the kernel rounds.
    if precision != "fp32" and not isinstance(config, MinimaxConfig):
        counted = replace(counted, matmul_precision="fp32")
        rounding = _ROUNDING_PASSES.get(precision, 0.0)
    count, of_well_conditioned = (
        num_products(
            counted,
            root,
            epsilon=epsilon,
            dtype=dtype,
            condition_number=condition_number,
            residual_threshold=residual_threshold,
            has_kernels=True,
        )
        for condition_number in (REFERENCE_CONDITION_NUMBER, _WELL_CONDITIONED)
    )
    return SolverCost(
        count.num_products,
        count.num_symmetric,
        count.num_columns,
        count.num_eigendecompositions,
        count.num_moved,
        count.num_passes + rounding * count.num_products,
        depends_on_data=count != of_well_conditioned,
    )


def eigenbasis_cost(config: EigendecompositionConfig) -> SolverCost:
    """What the methods' docstrings say that new eigenvectors cost; a QR decomposition is 4/3 products.

    Args:
        config: How eigenvectors are computed.

    Returns:
        The cost of one matrix.

    Examples:
        >>> eigenbasis_cost(OrthogonalIterationConfig()).num_matmuls
        4.0
    """
    match config:
        case OrthogonalIterationConfig():
            of_one = {
                "rotation": (4.0, 1.0),
                "cholesky_qr": (5.0, 2.0),
                "householder": (7 / 3, 0.0),
            }
            products, symmetric = (
                config.num_iterations * n for n in of_one[config.orthogonalization]
            )
        case QREigendecompositionConfig():
            steps = config.max_iterations
            products, symmetric = 2.0 + steps * (1.0 + 4 / 3) + max(steps - 1, 0), 0.0
        case _:
            return SolverCost(num_eigendecompositions=1.0, depends_on_data=config.tolerance > 0.0)
    # No operand is said to be shared.
    return SolverCost(
        products, symmetric, num_moved=3.0 * products, depends_on_data=config.tolerance > 0.0
    )


def orthogonalization_flops(
    config: OrthogonalizationConfig, num_rows: int, num_columns: int
) -> tuple[float, float]:
    """What the methods' docstrings say that the nearest orthogonal matrix costs.

    Args:
        config: How it is computed.
        num_rows: Of the matrix.
        num_columns: Of the matrix.

    Returns:
        FLOPs of products, and of a decomposition.

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, section 8.6.4 (singular values).

    Examples:
        >>> orthogonalization_flops(NewtonSchulzOrthogonalizationConfig(num_iterations=1), 8, 4)
        (640.0, 0.0)
    """
    n, m = sorted((num_rows, num_columns))
    match config:
        case SVDOrthogonalizationConfig():
            return 2.0 * m * n**2, 14.0 * m * n**2 + 8.0 * n**3
        case GramOrthogonalizationConfig():
            root = measure_solver(config.root_inv_config, 2, 0.0, torch.float32)
            return 4.0 * m * n**2 + root.matmul_flops(n), root.eigendecomposition_flops(n)
        case NewtonSchulzOrthogonalizationConfig() | MinimaxPolarConfig():
            return config.num_iterations * (4.0 * m * n**2 + 2.0 * n**3), 0.0
    raise ValueError(f"{type(config).__name__} can't be planned: its cost is not known.")
