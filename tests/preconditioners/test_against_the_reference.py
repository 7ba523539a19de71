"""Every list on whichever base against a plain float64 reference, block by block."""

from __future__ import annotations

import pytest
import torch

from tests.preconditioners.list_table import (
    LISTS,
    build,
    gradients,
    mean_magnitude,
    parameters,
)
from tests.reference import preconditioners as reference
from tests.reference.shampoo import Block, Options, ReferenceShampoo

# Per row of the table: the reference's block, and options of the reference.
REFERENCES: dict[str, tuple[type[Block], dict[str, object]]] = {
    "root_inv": (Block, {}),
    "root_inv_kl": (reference.KLBlock, {}),
    "soap": (reference.soap(), {}),
    "soap_unpacked": (reference.soap(), {}),
    "soap_options": (
        reference.soap({2: [1], 3: [0, 2], 1: [0]}, {2: 0.375, 3: 0.25}),
        {"use_trace_scaling": True, "drop_weighting_factor": True},
    ),
    "soap_qr": (reference.soap(num_qr_iterations=1), {}),
    "eigendecomposed": (reference.EigendecomposedBlock, {}),
    "eigendecomposed_options": (
        reference.DampedLaterBlock,
        {"exponents": {2: 0.5, 3: {0: 0.0, 1: 0.3}}},
    ),
    "eigendecomposed_kl": (reference.EigendecomposedKLBlock, {}),
    "spectral_descent": (reference.NewtonSchulzBlock, {}),
    "sign_descent": (reference.sign(), {}),
    "sign_descent_scaled": (reference.sign(mean_magnitude), {}),
}


def test_the_references_are_of_rows_of_the_table() -> None:
    assert REFERENCES.keys() <= {row.name for row in LISTS}
    assert len(REFERENCES) >= 12


@pytest.mark.parametrize("row", [row for row in LISTS if row.name in REFERENCES], ids=str)
@pytest.mark.parametrize("frequency", [1, 5])
def test_parameters_are_the_reference_s(row, frequency) -> None:
    block, options = REFERENCES[row.name]
    # The first eigenvectors when every factor has full rank: those of a kernel are arbitrary.
    shared = {"precondition_frequency": frequency, "start_preconditioning_step": 20}
    params = parameters(row.shapes, torch.float64)
    expected = ReferenceShampoo(
        params,
        Options(lr=0.02, beta1=0.9, beta2=0.95, epsilon=row.epsilon, **shared, **options),
        block,
    )
    optimizer = build(row, params, torch.float64, **shared)
    for missing, steps in (("never", 31), ("some", 2)):
        for grads in gradients(row.shapes, torch.float64, steps, missing):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
            expected.step(grads)
    for param, theirs in zip(params, expected.params(), strict=True):
        error = (param.double() - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert float(error) <= 1e-7, tuple(param.shape)
