"""Settings to start from, by the kind of model: the optimizer's arguments, and a schedule.

    optimizer = DashShampoo(**recipes.language_model(model))
    schedule = recipes.warmup_and_cosine(optimizer, total_steps=10_000)

What they rest on is the project's study of five small tasks (``python -m experiments study``; the tables are
in benchmarks/results/study_cpu_2026-11-25). Learning rates are those of its tasks: a few hundred steps of
small models. Take them as the middle of a search by factors of two.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from dash_shampoo.base import AdamPreconditionerConfig, WeightDecayType
from dash_shampoo.config import (
    DashShampooPreconditionerConfig,
    DefaultDashConfig,
    DefaultDashConvnetConfig,
)
from dash_shampoo.grouping import param_groups

__all__ = ["convnet", "language_model", "warmup_and_cosine"]


def language_model(
    model: nn.Module,
    *,
    lr: float = 0.005,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    precondition_frequency: int = 1,
) -> dict[str, Any]:
    """Arguments of `DashShampoo` for a transformer: hidden matrices by Shampoo, the rest by Adam.

    Args:
        model: The model; its parameters are split by `param_groups`.
        lr: Peak learning rate of all groups.
        beta2: Memory of the factor matrices, of the grafted length and of Adam.
        weight_decay: Decoupled; of matrices, embeddings and heads, not of vectors.
        precondition_frequency: Steps from one refresh of the roots to the next.

    Returns:
        Keyword arguments, parameter groups included.

    Raises:
        ValueError: As of `param_groups`.

    Examples:
        >>> from torch import nn
        >>> from dash_shampoo import DashShampoo, recipes
        >>> model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.LayerNorm(16))
        >>> optimizer = DashShampoo(**recipes.language_model(model, lr=0.01))
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [1, 1, 3]
    """
    options = _common(DefaultDashConfig, lr, beta2, weight_decay, precondition_frequency)
    return {"params": param_groups(model, adam=options["grafting_config"]), **options}


def convnet(
    model: nn.Module,
    *,
    lr: float = 0.005,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    precondition_frequency: int = 1,
) -> dict[str, Any]:
    """Arguments of `DashShampoo` for a convolutional network: everything by Shampoo, exponents 1/4.

    In the study everything by Shampoo was at least as good on convnets as hidden matrices alone. For an
    MLP take ``preconditioner_config=DefaultDashConfig`` instead: its exponent 1/2 was better there.

    Args:
        model: The model.
        lr: Peak learning rate.
        beta2: As of `language_model`.
        weight_decay: Decoupled; of everything.
        precondition_frequency: As of `language_model`.

    Returns:
        Keyword arguments, parameters included.

    Examples:
        >>> from torch import nn
        >>> from dash_shampoo import DashShampoo, recipes
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> optimizer = DashShampoo(**recipes.convnet(model))
        >>> len(optimizer.param_groups)
        1
    """
    options = _common(DefaultDashConvnetConfig, lr, beta2, weight_decay, precondition_frequency)
    return {"params": list(model.named_parameters()), **options}


def _common(
    config: DashShampooPreconditionerConfig,
    lr: float,
    beta2: float,
    weight_decay: float,
    precondition_frequency: int,
) -> dict[str, Any]:
    return {
        "lr": lr,
        "betas": (0.9, beta2),
        "epsilon": 1e-12,
        "weight_decay": weight_decay,
        "weight_decay_type": WeightDecayType.DECOUPLED,
        "max_preconditioner_dim": 1024,
        "precondition_frequency": precondition_frequency,
        "grafting_config": AdamPreconditionerConfig(beta2=beta2, epsilon=1e-8),
        "preconditioner_config": config,
    }


def warmup_and_cosine(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.1, end: float = 0.1
) -> OneCycleLR:
    """The study's schedule: up from a hundredth, then down by half a cosine.

    Args:
        optimizer: Its groups' lr are the peaks.
        total_steps: Calls of ``schedule.step()`` until the end.
        warmup: Share of the steps until the peak.
        end: Last learning rate, as a share of the peak. Above 0.

    Returns:
        The schedule; call its `step` after the optimizer's. Betas are left alone.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> schedule, rates = warmup_and_cosine(optimizer, 21), []
        >>> for _ in range(20):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     optimizer.step(); schedule.step()
        >>> rates[0], max(rates), round(schedule.get_last_lr()[0], 9)
        (0.005, 0.5, 0.05)
    """
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=warmup,
        cycle_momentum=False,
        div_factor=100.0,
        final_div_factor=0.01 / end,
    )
