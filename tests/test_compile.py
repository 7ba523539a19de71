"""torch.compile of the step: no more graphs than the base's own optimizer, and the same result."""

from __future__ import annotations

import shutil

import pytest
import torch

import dash_shampoo as ds

SHAPES = [(8, 8), (5,), (8, 8)]
graphs = []


def counting(graph_module, example_inputs):
    del example_inputs
    graphs.append(graph_module)
    return graph_module.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    graphs.clear()
    yield
    torch._dynamo.reset()


def run(optimizer_class, backend):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    optimizer = optimizer_class(
        params,
        lr=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-3,
        weight_decay=0.01,
        max_preconditioner_dim=8,
        precondition_frequency=2,
        grafting_config=ds.AdamPreconditionerConfig(),
        shampoo_pt2_compile_config=backend and ds.ShampooPT2CompileConfig(backend=backend),
    )
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if step >= 2:  # other blocks are active: compiled anew
            params[1].grad = None
        optimizer.step()
    return params


def assert_close(found, expected):
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_no_more_graphs_than_the_base():
    run(ds.DistributedShampoo, counting)
    allowed = len(graphs)
    assert allowed > 0
    torch._dynamo.reset()
    graphs.clear()
    compiled = run(ds.DashShampoo, counting)
    assert 0 < len(graphs) <= allowed
    assert_close(compiled, run(ds.DashShampoo, None))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backend(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    assert_close(run(ds.DashShampoo, backend), run(ds.DashShampoo, None))
