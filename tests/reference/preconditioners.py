"""The other preconditioners of the Shampoo family, block by block and in float64; see shampoo.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.shampoo import Block, Options, bias_correction, inverse_power, unfold


def mode_product(G: Tensor, X: Tensor, k: int) -> Tensor:
    """G ×_k X: rows of X against dimension k."""
    return torch.tensordot(X, G, dims=([1], [k])).movedim(0, k)


class KLBlock(Block):
    """KL-Shampoo: a factor sums outer products of gradients preconditioned in the other dimensions."""

    def accumulate(self, G: Tensor) -> None:
        o = self.options
        new = 1.0 if o.beta2 == 1.0 or o.drop_weighting_factor else 1 - o.beta2
        preconditioned = []
        for k in range(G.dim()):
            P = G
            for other, (R, exponent) in enumerate(zip(self.roots, self.exponents, strict=True)):
                if other != k and exponent != 0.0:
                    P = mode_product(P, R, other)
            preconditioned.append(P)
        for k, L in enumerate(self.factors):
            P = unfold(preconditioned[k], k)
            L.mul_(o.beta2).add_(new * P @ P.T)


class EigendecomposedBlock(Block):
    """Shampoo from stored eigenvalues and eigenvectors, the identity and ones at first.

    The optimizer's epsilon is added before the decomposition, or to the eigenvalues after it.
    """

    perturb_before = True

    def __init__(self, W: Tensor, options: Options) -> None:
        super().__init__(W, options)
        self.roots = [self.root(torch.ones(n), torch.eye(n), k) for k, n in enumerate(W.shape)]

    def refresh_roots(self, t: int) -> None:
        o = self.options
        correction = bias_correction(1.0, o.beta2, t)
        for k, L in enumerate(self.factors):
            A = L / correction
            if self.perturb_before:
                A = A + o.epsilon * torch.eye(len(A), dtype=A.dtype)
            self.roots[k] = self.root(*torch.linalg.eigh(A), k)

    def root(self, eigenvalues: Tensor, Q: Tensor, k: int) -> Tensor:
        epsilon, smallest = self.options.epsilon, eigenvalues.min()
        if not self.perturb_before:
            eigenvalues = eigenvalues - smallest.clamp(max=0.0) + epsilon
        elif smallest < epsilon:
            eigenvalues = eigenvalues - smallest + epsilon
        return (Q.double() * eigenvalues.double() ** -self.exponents[k]) @ Q.double().T


class DampedLaterBlock(EigendecomposedBlock):
    perturb_before = False


class EigendecomposedKLBlock(KLBlock, EigendecomposedBlock):
    pass


def soap(
    ignored: dict[int, list[int]] | None = None,
    exponents: dict[int, float] | None = None,
    num_qr_iterations: int | None = None,
) -> type[Block]:
    """Adam in the eigenbasis of the factors; eigenvectors by eigh, or by QR iterations from the last."""

    class SOAPBlock(Block):
        def __init__(self, W: Tensor, options: Options) -> None:
            super().__init__(W, options)
            self.bases = [torch.eye(n, dtype=W.dtype) for n in W.shape]
            self.S = torch.zeros_like(W)
            self.kept = (ignored or {}).get(W.dim(), [])
            self.exponent = (exponents or {}).get(W.dim(), 0.5)

        def refresh_roots(self, t: int) -> None:
            o = self.options
            for k, L in enumerate(self.factors):
                A = L if o.drop_weighting_factor else L / bias_correction(1.0, o.beta2, t)
                if o.use_trace_scaling:
                    A = A / math.sqrt(torch.trace(A))
                A = A + o.epsilon * torch.eye(len(A), dtype=A.dtype)
                if num_qr_iterations is None:
                    self.bases[k] = torch.linalg.eigh(A)[1]
                    continue
                Q = self.bases[k]
                for _ in range(num_qr_iterations):
                    Q = Q @ torch.linalg.qr(Q.T @ A @ Q)[0]
                order = (Q.T @ A @ Q).diag().argsort(stable=True)
                self.bases[k] = Q[:, order]

        def rotated(self, G: Tensor) -> Tensor:
            for k, Q in enumerate(self.bases):
                G = G if k in self.kept else mode_product(G, Q.T, k)
            return G

        def filter(self, G: Tensor, t: int) -> Tensor:
            o = self.options
            new = 1.0 if o.drop_weighting_factor else 1 - o.beta2
            self.S = o.beta2 * self.S + new * self.rotated(G) ** 2
            return super().filter(G, t)

        def direction(self, G: Tensor, t: int) -> Tensor:
            o = self.options
            S = self.S if o.drop_weighting_factor else self.S / bias_correction(1.0, o.beta2, t)
            P = self.rotated(G) / (S**self.exponent + o.epsilon)
            for k, Q in enumerate(self.bases):
                P = P if k in self.kept else mode_product(P, Q, k)
            return P

    return SOAPBlock


class NewtonSchulzBlock(Block):
    """Spectral descent with Muon's polynomial."""

    def direction(self, G: Tensor, t: int) -> Tensor:
        X = G / max(float(G.norm()), 1e-8)
        for _ in range(5):
            B = X @ X.T
            X = 3.4445 * X + (-4.7750 * B + 2.0315 * B @ B) @ X
        return X


def sign(scale: Callable[[Tensor], Tensor] | None = None) -> type[Block]:
    class SignBlock(Block):
        def direction(self, G: Tensor, t: int) -> Tensor:
            return G.sign() if scale is None else G.sign() * scale(G)

    return SignBlock


__all__ = [
    "DampedLaterBlock",
    "EigendecomposedBlock",
    "EigendecomposedKLBlock",
    "KLBlock",
    "NewtonSchulzBlock",
    "inverse_power",
    "sign",
    "soap",
]
