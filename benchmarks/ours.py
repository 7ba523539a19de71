"""Our configs for `step_time.py`: every solver and every list, set as the peers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

import dash_shampoo as ds
from benchmarks.peers import BETAS, EPSILON, GRAFTING_EPSILON, LR, Steppable, of_groups

_META = ds.base.name == "meta"


@dataclass(frozen=True)
class Config:
    """One of our configs.

    Attributes:
        make (Callable): Makes it.
        on_base (bool): Whether the base's own list can compute it too.
        rival (str): The peers that it is compared with: those of this solver; "" for its own name.
        grafts (bool): Whether the length of an update is Adam's.
        matrices_alone (bool): Whether it takes whole matrices, and the rest is Adam's.
    """

    make: Callable[[], ds.PreconditionerConfig]
    on_base: bool = False
    rival: str = ""
    grafts: bool = True
    matrices_alone: bool = False


def _solver(make: Callable[[], ds.RootInvConfig]) -> Callable[[], ds.PreconditionerConfig]:
    return lambda: ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=make(), use_symmetric_packing=False
    )


def _soap(make: Callable[[], ds.EigendecompositionConfig]) -> Config:
    return Config(
        lambda: ds.EigenvalueCorrectedShampooPreconditionerConfig(
            amortized_computation_config=make(), use_symmetric_packing=False
        ),
        on_base=_META,
        rival="soap",
        grafts=False,
    )


def _spectral(make: Callable[[], ds.OrthogonalizationConfig], on_base: bool = False) -> Config:
    return Config(
        lambda: ds.SpectralDescentPreconditionerConfig(orthogonalization_config=make()),
        on_base=on_base,
        rival="muon",
        grafts=False,
        matrices_alone=True,
    )


CONFIGS = {
    "eigen": Config(_solver(ds.EigenConfig), on_base=True),
    "coupled_newton": Config(
        _solver(lambda: ds.CoupledNewtonConfig(max_iterations=10)), on_base=True
    ),
    "newton_db": Config(_solver(ds.NewtonDBConfig)),
    "newton_schulz": Config(_solver(ds.NewtonSchulzRootInvConfig)),
    "chebyshev": Config(_solver(ds.ChebyshevConfig)),
    "minimax": Config(_solver(ds.MinimaxConfig)),
    "minimax_auto": Config(_solver(lambda: ds.MinimaxConfig(matmul_precision="auto"))),
    "default": Config(lambda: ds.DefaultDashConfig),
    "kl": Config(
        lambda: ds.RootInvKLShampooPreconditionerConfig(use_symmetric_packing=False),
        on_base=_META,
    ),
    "eigendecomposed": Config(
        lambda: ds.EigendecomposedShampooPreconditionerConfig(use_symmetric_packing=False),
        on_base=_META,
    ),
    "eigendecomposed_kl": Config(
        lambda: ds.EigendecomposedKLShampooPreconditionerConfig(use_symmetric_packing=False),
        on_base=_META,
    ),
    "soap_eigh": _soap(ds.EighEigendecompositionConfig),
    "soap_qr": _soap(ds.QREigendecompositionConfig),
    "soap_rotation": Config(lambda: ds.DefaultDashSOAPConfig, rival="soap", grafts=False),
    "spectral_base": _spectral(ds.NewtonSchulzOrthogonalizationConfig, on_base=_META),
    "spectral_muon": _spectral(ds.MuonOrthogonalizationConfig),
    "spectral_minimax": _spectral(ds.MinimaxPolarConfig),
    "sign": Config(ds.SignDescentPreconditionerConfig, on_base=_META, grafts=False),
}


def shampoo(
    optimizer_class: Callable[..., ds.DistributedShampoo],
    config: Config,
    block: int,
    split: Callable[[Sequence[Parameter]], list[list[Parameter]]] = lambda params: [list(params)],
    is_distributed: bool = False,
) -> Callable[[Sequence[Parameter]], Steppable]:
    """Ours, or the base's class, refreshed in every step.

    Args:
        optimizer_class: Which of them.
        config: One of our configs.
        block: Largest dimension of a block.
        split: The groups of the parameters.
        is_distributed: Whether the processes share the blocks.

    Returns:
        Makes it from the parameters.
    """
    adam = ds.AdamPreconditionerConfig(beta2=BETAS[1], epsilon=GRAFTING_EPSILON)
    dimensions = 2 if config.matrices_alone else 1

    def groups_of(params: list[Parameter]) -> list[dict[str, Any]]:
        if not config.matrices_alone:
            return [{"params": params}]
        rest: dict[str, Any] = {
            "params": [p for p in params if p.ndim != 2],
            "preconditioner_config": adam,
            "epsilon": EPSILON,
        }
        groups = [{"params": [p for p in params if p.ndim == 2]}, rest]
        return [group for group in groups if group["params"]]

    def make(parameters: Sequence[Parameter]) -> Steppable:
        distributed = (
            ds.DDPDistributedConfig if is_distributed else ds.SingleDeviceDistributedConfig
        )
        return of_groups(
            optimizer_class(
                [group for params in split(parameters) for group in groups_of(params)],
                lr=LR,
                betas=BETAS,
                epsilon=EPSILON if config.grafts else GRAFTING_EPSILON,
                max_preconditioner_dim=math.inf if config.matrices_alone else block,
                precondition_frequency=1,
                grafting_config=adam if config.grafts else None,
                preconditioner_config=config.make(),
                distributed_config=distributed(target_parameter_dimensionality=dimensions),
            )
        )

    return make
