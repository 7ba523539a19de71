"""Slow, plain reference in float64: one eigendecomposition per block. Imports nothing of the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_inverse_root(A: Tensor, root: float, damping: Tensor | float = 0.0) -> Tensor:
    """(A + damping·I)^(-1/root) for each block of (B, N, N), in float64; damping per block or one number."""
    A = A.double()
    dampings = torch.as_tensor(damping, dtype=torch.float64).expand(A.shape[0])
    roots = []
    for block, extra in zip(A, dampings, strict=True):
        eigenvalues, eigenvectors = torch.linalg.eigh((block + block.T) / 2)
        roots.append((eigenvectors * (eigenvalues + extra) ** (-1.0 / root)) @ eigenvectors.T)
    return torch.stack(roots) if roots else A.clone()


def relative_error(X: Tensor, reference: Tensor) -> float:
    """The largest ‖X - R‖_F / ‖R‖_F over the blocks; NaN where X holds one."""
    difference = torch.linalg.vector_norm(X.double() - reference, dim=(-2, -1))
    return float((difference / torch.linalg.vector_norm(reference, dim=(-2, -1))).max())


def random_orthogonal(num_blocks: int, size: int, generator: torch.Generator) -> Tensor:
    """(B, N, N) random orthogonal matrices, float64."""
    gaussian = torch.randn(num_blocks, size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(gaussian)[0]


def random_spd(
    num_blocks: int, size: int, condition: float, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """(B, N, N) symmetric matrices with eigenvalues log-spaced in [scale/condition, scale], float64.

    Each block has its own eigenvectors, and all but the extreme eigenvalues are jittered.
    """
    exponents = torch.linspace(-math.log10(condition), 0.0, size, dtype=torch.float64)
    jitter = torch.rand(num_blocks, size, dtype=torch.float64, generator=generator) - 0.5
    jitter[:, 0], jitter[:, -1] = 0.0, 0.0
    step = math.log10(condition) / max(size - 1, 1)
    eigenvalues = scale * 10.0 ** (exponents + jitter * step)
    Q = random_orthogonal(num_blocks, size, generator)
    A = (Q * eigenvalues[:, None, :]) @ Q.mT
    return (A + A.mT) / 2
