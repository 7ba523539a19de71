"""Eigenvectors of stacks of factor matrices, from the previous ones, by one function and a config."""

from dash_shampoo.eigenbasis.dispatch import (
    check_basis_supported,
    eigenbasis,
    eigenbasis_stack,
    follows_a_basis,
    is_identity,
    method_at,
)
from dash_shampoo.eigenbasis.orthogonal_iteration import OrthogonalIterationConfig
from dash_shampoo.eigenbasis.result import EigenbasisResult

__all__ = [
    "EigenbasisResult",
    "OrthogonalIterationConfig",
    "check_basis_supported",
    "eigenbasis",
    "eigenbasis_stack",
    "follows_a_basis",
    "is_identity",
    "method_at",
]
