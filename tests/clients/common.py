"""What the tests of the clients share: small models, and settings that use everything."""

from __future__ import annotations

import torch

from tests.guards.common import construct, loss_of, network, values

SETTINGS = {"lr": 0.02, "weight_decay": 0.05}

__all__ = ["SETTINGS", "construct", "loss_of", "network", "scheduler_of", "values"]


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
