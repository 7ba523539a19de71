"""Captures factor matrices and gradients of a small real training, for the benchmark of the solvers.

    python benchmarks/capture_factors.py --steps 300 --out factors.pt

A byte-level Llama (2 layers, width 128) learns the sources of Python's standard library with AdamW;
meanwhile EMAs of G·Gᵀ and Gᵀ·G are kept for the blocks of some weights, and written with the last gradient.
The file in `benchmarks/data`, which tests and results refer to, is of a GPT-style block (query, key and value
in one weight) and a constant learning rate; this one's factors are better conditioned.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.tasks import LlamaTask, fit

# Name of the block: (weight, rows, columns).
WATCHED = {
    "query 64": ("blocks.0.attention.query.weight", slice(64), slice(64)),
    "output 128": ("blocks.0.attention.output.weight", slice(None), slice(None)),
    "down 128": ("blocks.1.feed_forward.down.weight", slice(None), slice(128)),
    "embedding 64": ("embedding.weight", slice(64, 128), slice(64)),
    "head 64": ("head.weight", slice(64, 128), slice(64)),
}


def capture(steps: int, width: int, betas: tuple[float, ...]) -> list[dict[str, Any]]:
    """One entry per block: its last gradient, and the pair of factor matrices for each beta."""
    gradients: dict[str, Tensor] = {}
    factors = {(name, beta): [0.0, 0.0] for name in WATCHED for beta in betas}

    def watch(model: nn.Module, step: int) -> None:
        for name, (weight, rows, columns) in WATCHED.items():
            G = gradients[name] = model.get_parameter(weight).grad[rows, columns].clone()
            for beta in betas:
                pair = factors[name, beta]
                pair[0] = beta * pair[0] + (1 - beta) * (G @ G.T)
                pair[1] = beta * pair[1] + (1 - beta) * (G.T @ G)

    loss = fit(
        LlamaTask(steps, width, sequence_length=128),
        lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3),
        seed=0,
        after_backward=watch,
    )
    print(f"validation loss {loss.loss:.3f} after {steps} steps")
    return [
        {
            "name": name,
            "G": gradients[name],
            "factors": {beta: tuple(factors[name, beta]) for beta in betas},
        }
        for name in WATCHED
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("factors.pt"))
    arguments = parser.parse_args()
    captured = capture(arguments.steps, arguments.width, betas=(0.95, 0.999))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(captured, arguments.out)
    print(f"{len(captured)} weights, {arguments.out.stat().st_size / 1e6:.2f} MB")
    for entry in captured:
        for beta, pair in entry["factors"].items():
            for side, factor in zip("LR", pair, strict=True):
                eigenvalues = torch.linalg.eigvalsh(factor.double())
                print(
                    f"{entry['name']} {beta} {side}: λ_max = {eigenvalues[-1]:.1e}, "
                    f"λ_median/λ_max = {eigenvalues.median() / eigenvalues[-1]:.1e}, "
                    f"λ_min/λ_max = {eigenvalues[0] / eigenvalues[-1]:.1e}"
                )


if __name__ == "__main__":
    main()
