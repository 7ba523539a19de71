"""The optimizers of a study, each as a value: equal values are the same runs."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

import dash_shampoo as ds
from experiments.optimizers import MuonWithAdamW

_EPS = 1e-8


class Side(Protocol):
    """One optimizer with its settings, all but the learning rate."""

    @property
    def lr(self) -> float:
        """Where the search for the learning rate starts."""

    @property
    def as_matrices(self) -> bool:
        """Whether it is given convolution kernels as matrices (out, in·…)."""

    def build(self, model: nn.Module, lr: float, block: int) -> Optimizer:
        """Make the optimizer.

        Args:
            model: What it trains.
            lr: Peak learning rate.
            block: Largest side of a preconditioner, for those that have blocks.

        Returns:
            The optimizer.
        """


def digest(side: Side) -> str:
    """A short name of all of a side's settings, by which its runs are found again.

    Args:
        side: The side.

    Returns:
        Twelve hexadecimal digits.
    """
    return hashlib.sha256(repr(side).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class AdamW:
    """torch's AdamW, without decay."""

    beta2: float = 0.95
    lr: float = 0.004
    as_matrices: bool = False

    def build(self, model: nn.Module, lr: float, block: int) -> Optimizer:
        """See `Side`."""
        betas = (0.9, self.beta2)
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=_EPS, weight_decay=0.0)


@dataclass(frozen=True)
class Muon:
    """torch's Muon for hidden matrices, AdamW for embedding, head and vectors."""

    lr: float = 0.008
    as_matrices: bool = True

    def build(self, model: nn.Module, lr: float, block: int) -> Optimizer:
        """See `Side`."""
        return MuonWithAdamW([{"params": list(model.named_parameters())}], lr=lr)


@dataclass(frozen=True)
class PackageSOAP:
    """SOAP of the package pytorch_optimizer."""

    frequency: int = 1
    lr: float = 0.004
    as_matrices: bool = False

    def build(self, model: nn.Module, lr: float, block: int) -> Optimizer:
        """See `Side`."""
        from pytorch_optimizer import SOAP

        optimizer: Optimizer = SOAP(
            model.parameters(),
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            precondition_frequency=self.frequency,
            max_precondition_dim=max(block, 256),
        )
        return optimizer


Routing = Literal["all", "matrices", "hidden"]


@dataclass(frozen=True)
class Shampoo:
    """Distributed Shampoo, stacked or the base's own.

    Attributes:
        config: The preconditioner.
        lr: See `Side`.
        beta2: Of factor matrices, of grafting and of Adam.
        frequency: Steps from one refresh to the next.
        epsilon: Absolute damping.
        grafts: Whether the length of an update is another method's.
        grafting: That method; None is Adam.
        routing: What the preconditioner works on: "all"; "matrices", with vectors by Adam in the same
            optimizer; "hidden" matrices, with embedding and head by Adam too.
        stacked: Whether it is `DashShampoo` or the base's class.
        block: Largest side of a preconditioner; None takes the task's.
        as_matrices: See `Side`.
        options: More of the constructor's arguments.
    """

    config: ds.PreconditionerConfig
    lr: float = 0.01
    beta2: float = 0.95
    frequency: int = 1
    epsilon: float = 1e-12
    grafts: bool = True
    routing: Routing = "hidden"
    stacked: bool = True
    block: int | None = None
    as_matrices: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    grafting: ds.PreconditionerConfig | None = None

    def __repr__(self) -> str:
        # What a later version adds, with a default that changes nothing, does not make it another side.
        return _settings(self)

    def build(self, model: nn.Module, lr: float, block: int) -> Optimizer:
        """See `Side`."""
        adam = ds.AdamPreconditionerConfig(beta2=self.beta2, epsilon=_EPS)
        constructor = ds.DashShampoo if self.stacked else ds.DistributedShampoo
        return constructor(
            self._groups(model, adam),
            lr=lr,
            betas=(0.9, self.beta2),
            epsilon=self.epsilon,
            max_preconditioner_dim=self.block or block,
            precondition_frequency=self.frequency,
            grafting_config=(self.grafting or adam) if self.grafts else None,
            preconditioner_config=self.config,
            **self.options,
        )

    def _groups(self, model: nn.Module, adam: ds.AdamPreconditionerConfig) -> Any:
        if self.routing == "all":
            return list(model.named_parameters()) if self.stacked else model.parameters()
        if self.routing == "hidden":
            # The base wants an epsilon above 0 wherever there is no pseudo-inverse.
            edges: Any = {name: {"epsilon": 1e-12} for name in ("embeddings", "heads", "vectors")}
            return ds.param_groups(model, adam=adam, **edges)
        named = list(model.named_parameters())
        vectors = {
            "params": [(n, p) for n, p in named if p.ndim < 2],
            "preconditioner_config": adam,
            "grafting_config": None,
            "max_preconditioner_dim": math.inf,
        }
        return [{"params": [(n, p) for n, p in named if p.ndim >= 2]}, vectors]


def _settings(config: Any) -> str:
    """The fields of a dataclass that are not at their defaults, the nested ones too."""
    parts = []
    for one in fields(config):
        value, default = getattr(config, one.name), one.default
        if one.default_factory is not MISSING:
            default = one.default_factory()
        if value != default:
            shown = _settings(value) if is_dataclass(value) else repr(value)
            parts.append(f"{one.name}={shown}")
    return f"{type(config).__name__}({', '.join(parts)})"


def root(
    solver: ds.RootInvConfig,
    exponent: float | Mapping[int, Any] = 0.5,
    kind: type[ds.RootInvShampooPreconditionerConfig] = ds.DashShampooPreconditionerConfig,
) -> ds.RootInvShampooPreconditionerConfig:
    """A preconditioner by inverse roots.

    Args:
        solver: Of the roots.
        exponent: Of every dimension of every tensor, or by order as in the base's config.
        kind: Of the config.

    Returns:
        The config, with roots tested and bad ones repaired where they are stacked.
    """
    by_order = dict.fromkeys(range(1, 6), exponent) if isinstance(exponent, float) else exponent
    safety: Any = (
        {"safety": ds.SafetyConfig()} if kind is ds.DashShampooPreconditionerConfig else {}
    )
    return kind(
        amortized_computation_config=solver,
        inverse_exponent_override=dict(by_order),
        use_symmetric_packing=False,
        **safety,
    )
