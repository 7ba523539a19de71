"""What the tests of the embedded base share: parameters, gradients, runs, comparisons."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

import dash_shampoo.base.embedded as embedded

# 0-d to 4-d, with ones, ragged in one and in both directions at block 8, and larger than a block in all.
SHAPES = [(), (1,), (7,), (3, 2), (8, 8), (20, 13), (2, 1, 3, 4), (9, 3, 5), (2, 3, 9, 4)]


@functools.cache
def meta():
    """Meta's package, or a skip with the reason."""
    return pytest.importorskip(
        "distributed_shampoo", reason="Meta's distributed_shampoo package is not installed"
    )


def meta_types():
    meta()
    return importlib.import_module("distributed_shampoo.shampoo_types")


def config_class(base, name):
    """A config class of a base: `embedded` or Meta's package."""
    if base is embedded:
        return getattr(embedded, name)
    return getattr(base, name, None) or getattr(meta_types(), name)


def parameters(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def gradients(num_steps, missing="never", dtype=torch.float64, shapes=SHAPES):
    """For every step a list of gradients, of which some may be None."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for step in range(num_steps):
        grads = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        steps.append(
            [
                None
                if (missing == "some" and index % 3 == 1)
                or (missing == "changing" and (index + step) % 3 == 0)
                else grad.to(dtype)
                for index, grad in enumerate(grads)
            ]
        )
    return steps


def take_steps(optimizer, params, steps):
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def flatten(state, prefix=()):
    """Pairs of path and tensor of a nested state."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def relative_error(found, expected):
    """‖found - expected‖ over the norm that the parameters start with: they may have come near zero."""
    found, expected = found.detach().double(), expected.detach().double()
    scale = max(torch.linalg.vector_norm(expected).item(), expected.numel() ** 0.5, 1e-30)
    return torch.linalg.vector_norm(found - expected).item() / scale
