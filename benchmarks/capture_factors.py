"""Captures factor matrices and gradients of a small real training, for the benchmark of the solvers.

    python benchmarks/capture_factors.py --steps 300 --out benchmarks/data/factors.pt

A byte-level transformer (2 layers, width 128) learns the sources of Python's standard library with AdamW;
meanwhile EMAs of G·Gᵀ and Gᵀ·G are kept for the blocks of some weights, and written with the last gradient.
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE, BATCH = 128, 16


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def corpus() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8
    )


def capture(steps: int, width: int, betas: tuple[float, ...]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    data = corpus().long()
    embedding = nn.Embedding(256, width)
    model = nn.Sequential(embedding, *(Block(width, 4) for _ in range(2)), nn.RMSNorm(width))
    head = nn.Linear(width, 256, bias=False)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    watched = {
        "qkv 64": lambda: model[1].qkv.weight.grad[:64, :64],
        "output 128": lambda: model[1].output.weight.grad,
        "down 128": lambda: model[2].down.weight.grad[:, :128],
        "embedding 64": lambda: embedding.weight.grad[64:128, :64],
        "head 64": lambda: head.weight.grad[64:128, :64],
    }
    factors = {(name, beta): [0.0, 0.0] for name in watched for beta in betas}
    for step in range(steps):
        start = torch.randint(len(data) - SEQUENCE - 1, (BATCH,))
        tokens = data[start[:, None] + torch.arange(SEQUENCE + 1)]
        logits = head(model(tokens[:, :-1]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for (name, beta), pair in factors.items():
            G = watched[name]()
            pair[0] = beta * pair[0] + (1 - beta) * (G @ G.T)
            pair[1] = beta * pair[1] + (1 - beta) * (G.T @ G)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f}", flush=True)
        if step < steps - 1:
            optimizer.step()
    return [
        {
            "name": name,
            "G": gradient().clone(),
            "factors": {beta: tuple(factors[name, beta]) for beta in betas},
        }
        for name, gradient in watched.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "factors.pt")
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
