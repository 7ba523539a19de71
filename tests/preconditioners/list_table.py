"""The one table of preconditioners: every contract test of the lists runs over all of its rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dash_shampoo as ds

ALL_ORDERS = ((), (1,), (6,), (7, 9), (8, 8), (8, 8), (20, 13), (3, 4, 5), (2, 3, 4, 5))
MATRICES = ((7, 9), (8, 8), (8, 8), (20, 13), (3, 16))
# Models by name: tensors of every order; a perceptron with biases; a convnet with square and other kernels.
MODELS = {
    "all orders": ALL_ORDERS,
    "perceptron": ((24, 10), (24,), (8, 24), (8,), (5, 8), (5,)),
    "convnet": ((6, 3, 3, 3), (6,), (8, 6, 1, 3), (8,), (10, 8), (10,)),
}
MODELS_OF_MATRICES = {
    "all orders": MATRICES,
    "perceptron": ((24, 10), (8, 24), (5, 8)),
    "convnet": ((6, 2, 2, 2), (8, 4, 1, 2), (8, 6, 1, 1), (10, 8)),
}


def mean_magnitude(grad: Tensor) -> Tensor:
    return grad.abs().mean()


def _config(name: str, **options: Any) -> Callable[[torch.dtype], Any]:
    """A config whose state has the given dtype."""

    def build(dtype: torch.dtype) -> Any:
        cls = getattr(ds, name)
        names = cls.__dataclass_fields__
        dtypes = {
            key: dtype
            for key in (
                "factor_matrix_dtype",
                "inv_factor_matrix_dtype",
                "factor_matrix_eigenvectors_dtype",
                "factor_matrix_eigenvalues_dtype",
                "corrected_eigenvalues_dtype",
            )
            if key in names
        }
        return cls(**{**dtypes, **options})

    return build


@dataclass(frozen=True)
class Row:
    """A preconditioner.

    Attributes:
        name: Unique.
        config: The config, with state of a dtype.
        shapes: Parameters that it takes.
        epsilon: The optimizer's.
        options: Further options of the optimizer.
        keys: Keys of a block's state.
    """

    name: str
    config: Callable[[torch.dtype], Any]
    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ALL_ORDERS
    epsilon: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def models(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Models that it takes, by name."""
        return MODELS if self.shapes is ALL_ORDERS else MODELS_OF_MATRICES


_pseudo_inverse = ds.EighEigendecompositionConfig(
    rank_deficient_stability_config=ds.PseudoInverseConfig(rank_rtol=1e-4)
)
_later = ds.EighEigendecompositionConfig(
    rank_deficient_stability_config=ds.PerturbationConfig(perturb_before_computation=False)
)
_ROOT = ("factor_matrices", "inv_factor_matrices")
_EIGEN = ("factor_matrices", "factor_matrices_eigenvectors", "factor_matrices_eigenvalues")
_SOAP = ("factor_matrices", "factor_matrices_eigenvectors", "corrected_eigenvalues")
_soap = functools.partial(_config, "EigenvalueCorrectedShampooPreconditionerConfig")
_eigen = functools.partial(_config, "EigendecomposedShampooPreconditionerConfig")
_eigen_kl = functools.partial(_config, "EigendecomposedKLShampooPreconditionerConfig")
_root_kl = functools.partial(_config, "RootInvKLShampooPreconditionerConfig")
_spectral = functools.partial(_config, "SpectralDescentPreconditionerConfig")
_sign = functools.partial(_config, "SignDescentPreconditionerConfig")
_qr = ds.QREigendecompositionConfig
_TO_MATRICES = {
    "distributed_config": ds.SingleDeviceDistributedConfig(target_parameter_dimensionality=2)
}

LISTS: tuple[Row, ...] = (
    Row("root_inv", _config("RootInvShampooPreconditionerConfig"), _ROOT),
    Row("root_inv_kl", _root_kl(), _ROOT),
    Row("soap", _soap(), _SOAP),
    Row("soap_unpacked", _soap(use_symmetric_packing=False), _SOAP),
    Row(
        "soap_options",
        _soap(
            ignored_basis_change_dims={2: [1], 3: [0, 2], 1: [0]},
            inverse_exponent_override={2: 0.375, 3: 0.25},
            use_trace_scaling=True,
            drop_weighting_factor_on_gsquare=True,
        ),
        _SOAP,
    ),
    Row(
        "soap_tolerance",
        _soap(amortized_computation_config=ds.EighEigendecompositionConfig(tolerance=0.2)),
        _SOAP,
    ),
    Row("soap_qr", _soap(amortized_computation_config=_qr()), _SOAP, epsilon=1e-3),
    Row(
        "soap_qr_tolerance",
        _soap(amortized_computation_config=_qr(max_iterations=5, tolerance=0.05)),
        _SOAP,
        epsilon=1e-3,
    ),
    Row("eigendecomposed", _eigen(), _EIGEN),
    Row(
        "eigendecomposed_options",
        _eigen(
            amortized_computation_config=_later,
            inverse_exponent_override={2: 0.5, 3: {0: 0.0, 1: 0.3}},
            use_symmetric_packing=False,
        ),
        _EIGEN,
    ),
    Row(
        "eigendecomposed_pseudo_inverse",
        _eigen(amortized_computation_config=_pseudo_inverse),
        _EIGEN,
        epsilon=0.0,
    ),
    Row("eigendecomposed_qr", _eigen(amortized_computation_config=_qr(max_iterations=3)), _EIGEN),
    Row("eigendecomposed_kl", _eigen_kl(), _EIGEN),
    Row("spectral_descent", _spectral(), (), MATRICES, options=_TO_MATRICES),
    Row(
        "spectral_descent_svd",
        _spectral(
            orthogonalization_config=ds.SVDOrthogonalizationConfig(scale_by_nuclear_norm=True)
        ),
        (),
        MATRICES,
        options={**_TO_MATRICES, "max_preconditioner_dim": math.inf},
    ),
    Row("sign_descent", _sign(), ()),
    Row("sign_descent_scaled", _sign(scale_fn=mean_magnitude), ()),
)
# What the base lacks: our options, methods and lists.
_normal = {"use_dimension_normalization": True, "safety": ds.SafetyConfig()}
_iteration = ds.OrthogonalIterationConfig
_dash_soap = functools.partial(_config, "DashSOAPPreconditionerConfig")
OURS: tuple[Row, ...] = (
    Row(
        "default",
        _config(
            "DashShampooPreconditionerConfig",
            amortized_computation_config=ds.MinimaxConfig(num_squarings=5),
            inverse_exponent_override=dict.fromkeys(range(1, 6), 0.5),
            use_symmetric_packing=False,
            safety=ds.SafetyConfig(),
        ),
        _ROOT,
    ),
    Row("dash_normal", _config("DashShampooPreconditionerConfig", **_normal), _ROOT),
    Row("dash_kl_normal", _config("DashKLShampooPreconditionerConfig", **_normal), _ROOT),
    Row(
        "dash_eigendecomposed_normal",
        _config("DashEigendecomposedShampooPreconditionerConfig", **_normal),
        _EIGEN,
    ),
    Row(
        "dash_eigendecomposed_kl_normal",
        _config("DashEigendecomposedKLShampooPreconditionerConfig", **_normal),
        _EIGEN,
    ),
    Row(
        "dash_staggered",
        _config("DashShampooPreconditionerConfig", stagger_refresh=True),
        _ROOT,
        options={"precondition_frequency": 3},
    ),
    Row(
        "dash_soap_staggered",
        _dash_soap(stagger_refresh=True),
        _SOAP,
        options={"precondition_frequency": 3},
    ),
    Row("dash_soap", _dash_soap(), _SOAP),
    Row(
        "dash_soap_sorted",
        _dash_soap(amortized_computation_config=ds.EighEigendecompositionConfig()),
        _SOAP,
    ),
    Row("dash_soap_normal", _dash_soap(**_normal), _SOAP),
    Row(
        "dash_soap_cholesky",
        _dash_soap(amortized_computation_config=_iteration(orthogonalization="cholesky_qr")),
        _SOAP,
    ),
    Row(
        "dash_soap_householder",
        _dash_soap(amortized_computation_config=_iteration(orthogonalization="householder")),
        _SOAP,
    ),
    *(
        Row(
            f"spectral_descent_{name}",
            _spectral(orthogonalization_config=method(compute_dtype=torch.float64)),
            (),
            MATRICES,
            options=_TO_MATRICES,
        )
        for name, method in {
            "muon": ds.MuonOrthogonalizationConfig,
            "minimax": ds.MinimaxPolarConfig,
        }.items()
    ),
    *(
        Row(f"scalar_{name.lower()}", _config(f"Scalar{name}PreconditionerConfig"), ())
        for name in ("AdaGrad", "RMSprop", "Adam")
    ),
)
ROWS = (*LISTS, *OURS)


def parameters(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradients(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, steps: int, missing: str = "never"
) -> Iterator[list[Tensor | None]]:
    """Gradients of low effective rank, so that directions differ; some of them None where wanted.

    The seed is one that leaves no two eigenvalues of a factor matrix so near each other that rounding
    turns their eigenvectors by 1e-7.
    """
    generator = torch.Generator().manual_seed(4)
    fixed = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for step in range(steps):
        grads: list[Tensor | None] = []
        for index, base in enumerate(fixed):
            noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
            grad = (base * math.cos(0.1 * step) + 0.3 * noise).to(dtype)
            is_missing = {
                "never": False,
                "some": index == 1,
                "alternating": (index + step) % 3 == 0,
            }[missing]
            grads.append(None if is_missing else grad)
        yield grads


def build(
    row: Row,
    params: list[torch.nn.Parameter],
    dtype: torch.dtype,
    cls: Any = ds.DashShampoo,
    **options: Any,
) -> Any:
    return cls(
        params,
        **{
            **dict(
                lr=0.02,
                betas=(0.9, 0.95),
                epsilon=row.epsilon,
                max_preconditioner_dim=8,
                preconditioner_config=row.config(dtype),
            ),
            **row.options,
            **options,
        },
    )


def run(
    row: Row, dtype: torch.dtype, steps: int, missing: str = "never", **options: Any
) -> tuple[list[torch.nn.Parameter], Any]:
    params = parameters(row.shapes, dtype)
    optimizer = build(row, params, dtype, **options)
    for grads in gradients(row.shapes, dtype, steps, missing):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params, optimizer


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state by their path; one form for both bases."""
    if isinstance(state, Tensor):
        return {prefix: state}
    if not isinstance(state, dict):
        return {}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        result |= flat(value, f"{prefix}/{key}")
    return result
