"""What rounded products add to the error of a root: `dash_shampoo/inverse_root/minimax/rounding.json`.

    python -m tools.minimax.rounding

Products are rounded as on a device, on the CPU; the matrices have spectra from flat to singular, and one is a
factor matrix of gradients of low rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import dash_shampoo
from dash_shampoo import MinimaxConfig
from dash_shampoo.inverse_root import inverse_root

TABLE = Path(dash_shampoo.__file__).parent / "inverse_root" / "minimax" / "rounding.json"
SIZE = 96
DAMPINGS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PROVENANCE = (
    "Largest relative error of an eigenvalue that rounded products add to the root 2, beside fp32's, over "
    "seven matrices of 96, products rounded on the CPU as on a device: python -m tools.minimax.rounding"
)


def matrices() -> Tensor:
    """(7, N, N) float64, eigenvalues at most about 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = torch.arange(SIZE, dtype=torch.float64)
    spectra = [
        10.0 ** (-8.0 * index / SIZE),
        10.0 ** (-3.0 * index / SIZE),
        (1.0 + index) ** -2.0,
        torch.where(index < 4, 1.0, 1e-9),
        torch.where(index < 1, 1.0, 1e-3),
        torch.linspace(1.0, 1e-4, SIZE, dtype=torch.float64),
    ]
    result = []
    for spectrum in spectra:
        Q = torch.linalg.qr(normal(SIZE, SIZE)).Q
        result.append((Q * spectrum) @ Q.T)
    F, U = torch.zeros(SIZE, SIZE, dtype=torch.float64), normal(SIZE, 8)
    for _ in range(40):
        G = U @ normal(8, SIZE) + 0.02 * normal(SIZE, SIZE)
        F = 0.95 * F + 0.05 * G @ G.T
    return torch.stack([*result, F / F.trace()])


def added_error(A: Tensor, precision: str, damping: float) -> float:
    """The largest |eigenvalue| of T^(-1/2) (X - X_fp32) T^(-1/2), T the exact root."""
    X, exact = (
        inverse_root(A.float(), 2, MinimaxConfig(matmul_precision=name, relative_epsilon=damping))
        for name in (precision, "fp32")
    )
    L, Q = torch.linalg.eigh(A)
    values = (L.clamp_min(0.0) + exact.damping.double()[:, None]).pow(0.25)
    half = (Q * values[:, None, :]) @ Q.mT
    difference = half @ (X.value - exact.value).double() @ half
    return float(torch.linalg.matrix_norm(difference, 2).max())


def main() -> None:
    """Measures and writes."""
    A = matrices()
    rows = {
        precision: {
            str(damping): float(f"{added_error(A, precision, damping):.1e}") for damping in DAMPINGS
        }
        for precision in ("fp16x3", "tf32", "fp16", "bf16")
    }
    lines = ",\n".join(f'    "{name}": {json.dumps(row)}' for name, row in rows.items())
    TABLE.write_text(
        f'{{\n  "provenance": {json.dumps(PROVENANCE)},\n  "error": {{\n{lines}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    main()
