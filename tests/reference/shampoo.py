"""Shampoo with grafting, written down block by block from arXiv 2309.06497. Slow, float64.

Iterate averaging follows arXiv 2512.17131 (primal averaging) and 2405.15682 (schedule-free). Plain
names of the papers: W parameter, G gradient, L_k factor of dimension k, P search direction.

One convention of Distributed Shampoo is not the papers': learning rate, bias corrections and averaging
coefficients are single-precision numbers. `coefficient` rounds them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def coefficient(value) -> float:
    return torch.as_tensor(value, dtype=torch.float32).item()


def bias_correction(scale: float, beta: float, exponent: int) -> float:
    """1 - scale·beta^exponent, every operation in single precision."""
    return (1.0 - scale * beta ** torch.tensor(exponent)).item()


@dataclass
class Options:
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 1.0
    beta3: float | None = None
    epsilon: float = 1e-6
    weight_decay: float = 0.0
    weight_decay_type: str = "DECOUPLED"
    peak_lr: float | None = None
    max_preconditioner_dim: int = 8
    precondition_frequency: int = 1
    start_preconditioning_step: int = 1
    use_bias_correction: bool = True
    grafting: str | None = None
    grafting_beta2: float = 0.95
    grafting_epsilon: float = 1e-8
    drop_weighting_factor: bool = False
    use_trace_scaling: bool = False
    exponents: dict = field(default_factory=dict)
    momentum: tuple[float, float, bool] | None = None
    primal_averaging: tuple[float, float] | None = None
    schedule_free: tuple[float, float] | None = None


def merged_shape(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Joins neighbouring dimensions from the last on, as long as the product is at most the limit."""
    shape = [n for n in shape if n != 1] or [1]
    merged = [shape.pop()]
    while shape:
        n = shape.pop()
        if merged[0] * n <= limit:
            merged[0] *= n
        else:
            merged.insert(0, n)
    return tuple(merged)


def block_slices(shape: tuple[int, ...], limit: int) -> list[tuple[slice, ...]]:
    pieces = [[slice(i, min(i + limit, n)) for i in range(0, n, limit)] for n in shape]
    return list(itertools.product(*pieces))


def unfold(tensor: Tensor, k: int) -> Tensor:
    return tensor.movedim(k, 0).reshape(tensor.shape[k], -1)


def inverse_power(A: Tensor, exponent: float, epsilon: float) -> Tensor:
    eigenvalues, Q = torch.linalg.eigh(A + epsilon * torch.eye(len(A), dtype=A.dtype))
    if eigenvalues.min() < epsilon:
        eigenvalues = eigenvalues - eigenvalues.min() + epsilon
    return Q @ torch.diag(eigenvalues**-exponent) @ Q.T


class Block:
    """A block of a parameter with all that Shampoo keeps for it."""

    def __init__(self, W: Tensor, options: Options) -> None:
        self.W = W.clone()
        self.options = options
        order = W.dim()
        override = options.exponents.get(order, 1 / (2 * order))
        if not isinstance(override, dict):
            override = dict.fromkeys(range(order), override)
        self.exponents = [override.get(k, 1 / (2 * order)) for k in range(order)]
        self.factors = [torch.zeros(n, n, dtype=W.dtype) for n in W.shape]
        self.roots = [torch.eye(n, dtype=W.dtype) for n in W.shape]
        self.V = torch.zeros_like(W)
        self.G_tilde = torch.zeros_like(W)
        self.M = torch.zeros_like(W)
        self.Z = W.clone()

    def step(self, G: Tensor, t: int, lr: float, mu_x: float, mu_y: float) -> None:
        o = self.options
        if o.weight_decay_type == "L2":
            G = G + o.weight_decay * self.W
        self.accumulate(G)
        if self.is_due(t):
            self.refresh_roots(t)
        P = self.direction(self.filter(G, t), t)

        decay = {
            "L2": 0.0,
            "DECOUPLED": o.weight_decay,
            "CORRECTED": o.weight_decay * lr / (o.peak_lr or o.lr),
            "INDEPENDENT": o.weight_decay / (o.peak_lr or o.lr),
        }[o.weight_decay_type]
        if o.primal_averaging or o.schedule_free:
            self.Z *= coefficient(1 - torch.tensor(lr, dtype=torch.float32) * decay)
            difference = self.Z - self.W
            self.Z -= lr * P
            scale = coefficient(1 - torch.tensor(mu_y) * torch.tensor(mu_x))
            self.W += coefficient(1 - torch.tensor(mu_x)) * difference - scale * lr * P
            return
        P = P + decay * self.W
        if o.momentum:
            momentum, dampening, use_nesterov = o.momentum
            self.M = momentum * self.M + (1 - dampening) * P
            P = (1 - dampening) * P + momentum * self.M if use_nesterov else self.M
        self.W -= lr * P

    def accumulate(self, G: Tensor) -> None:
        o = self.options
        new = 1.0 if o.beta2 == 1.0 or o.drop_weighting_factor else 1 - o.beta2
        for k, L in enumerate(self.factors):
            L.mul_(o.beta2).add_(new * unfold(G, k) @ unfold(G, k).T)
        if o.grafting == "AdaGrad":
            self.V += G**2
        elif o.grafting in ("RMSprop", "Adam"):
            new = 1.0 if o.drop_weighting_factor else 1 - o.grafting_beta2
            self.V = o.grafting_beta2 * self.V + new * G**2

    def is_due(self, t: int) -> bool:
        start, frequency = (
            self.options.start_preconditioning_step,
            self.options.precondition_frequency,
        )
        return t == start or (t > start and t % frequency == 0)

    def refresh_roots(self, t: int) -> None:
        o = self.options
        is_corrected = o.use_bias_correction and o.beta2 < 1.0 and not o.drop_weighting_factor
        correction = bias_correction(1.0, o.beta2, t) if is_corrected else 1.0
        for k, L in enumerate(self.factors):
            A = L / correction
            if o.use_trace_scaling:
                A = A / math.sqrt(torch.trace(A))
            self.roots[k] = inverse_power(A, self.exponents[k], o.epsilon)

    def filter(self, G: Tensor, t: int) -> Tensor:
        o = self.options
        if o.beta1 == 0.0:
            return G
        beta3 = o.beta1 if o.beta3 is None else o.beta3
        G_bar = beta3 * self.G_tilde + (1 - beta3) * G
        self.G_tilde = o.beta1 * self.G_tilde + (1 - o.beta1) * G
        if o.use_bias_correction:
            G_bar = G_bar / bias_correction(beta3, o.beta1, t - 1)
        return G_bar

    def direction(self, G: Tensor, t: int) -> Tensor:
        o = self.options
        if o.grafting and t < o.start_preconditioning_step:
            return self.grafted(G, t)
        P = G
        for k, (R, exponent) in enumerate(zip(self.roots, self.exponents, strict=True)):
            if exponent != 0.0:
                P = torch.tensordot(R, P, dims=([1], [k])).movedim(0, k)
        if o.grafting:
            P = P * (self.grafted(G, t).norm() / (P.norm() + 1e-16))
        return P

    def grafted(self, G: Tensor, t: int) -> Tensor:
        o = self.options
        if o.grafting == "SGD":
            return G
        V = self.V
        if o.grafting == "Adam" and not o.drop_weighting_factor:
            V = V / bias_correction(1.0, o.grafting_beta2, t)
        return G / (V.sqrt() + o.grafting_epsilon)


class ReferenceShampoo:
    """The optimizer: cuts parameters into blocks and counts steps. Parameters are not modified."""

    def __init__(
        self, params: list[Tensor], options: Options, block_class: type[Block] = Block
    ) -> None:
        self.options = options
        self.t = 0
        self.lr_sum = 0.0
        self.shapes = [tuple(p.shape) for p in params]
        limit = options.max_preconditioner_dim
        self.merged = [merged_shape(shape, limit) for shape in self.shapes]
        self.slices = [block_slices(shape, limit) for shape in self.merged]
        self.blocks = [
            [block_class(p.detach().double().reshape(shape)[s], options) for s in slices]
            for p, shape, slices in zip(params, self.merged, self.slices, strict=True)
        ]

    def step(self, grads: list[Tensor | None]) -> None:
        self.t += 1
        lr = coefficient(self.options.lr)
        mu_x, mu_y = self.averaging_coefficients(lr)
        for G, shape, slices, blocks in zip(
            grads, self.merged, self.slices, self.blocks, strict=True
        ):
            if G is not None:
                for s, block in zip(slices, blocks, strict=True):
                    block.step(G.double().reshape(shape)[s], self.t, lr, mu_x, mu_y)

    def averaging_coefficients(self, lr: float) -> tuple[float, float]:
        o = self.options
        if o.primal_averaging:
            mu_x, mu_y = o.primal_averaging
            return coefficient(mu_x), coefficient(mu_y)
        if o.schedule_free:
            mu_y, power = o.schedule_free
            new = torch.tensor(lr, dtype=torch.float32) ** power
            self.lr_sum = self.lr_sum + new
            return coefficient(1.0 - new / self.lr_sum), coefficient(mu_y)
        return 0.0, 0.0

    def params(self) -> list[Tensor]:
        """The sequence at which gradients are taken."""
        return self.assembled("W")

    def set_params(self, params: Sequence[Tensor]) -> None:
        """Other values of the sequence at which gradients are taken; the rest stays."""
        for param, merged, slices, blocks in zip(
            params, self.merged, self.slices, self.blocks, strict=True
        ):
            whole = param.reshape(merged)
            for s, block in zip(slices, blocks, strict=True):
                block.W.copy_(whole[s])
                if self.t == 0:  # Z begins where the first step finds the weights
                    block.Z.copy_(whole[s])

    def evaluation_params(self) -> list[Tensor]:
        """The averaged sequence X, from W = mu_y·X + (1 - mu_y)·Z."""
        o = self.options
        mu_y = coefficient(o.primal_averaging[1] if o.primal_averaging else o.schedule_free[0])
        return [
            (W - (1 - mu_y) * Z) / mu_y
            for W, Z in zip(self.assembled("W"), self.assembled("Z"), strict=True)
        ]

    def assembled(self, name: str) -> list[Tensor]:
        params = []
        for shape, merged, slices, blocks in zip(
            self.shapes, self.merged, self.slices, self.blocks, strict=True
        ):
            whole = torch.empty(merged, dtype=torch.float64)
            for s, block in zip(slices, blocks, strict=True):
                whole[s] = getattr(block, name)
            params.append(whole.reshape(shape))
        return params
