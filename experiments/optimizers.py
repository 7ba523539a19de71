"""Optimizers to compare with that torch has only in pieces."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

# Not hidden matrices, though they have two dimensions.
_BY_ADAMW = re.compile(r"(^|\.)((position_)?embedding|head)\.")


class MuonWithAdamW(Optimizer):
    """Muon for the hidden matrices, AdamW for embedding, head and everything that is no matrix.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both. The
    state is that of `torch.optim.Muon` and `torch.optim.AdamW`, in one `state_dict`.

    Args:
        params: Groups of named parameters.
        lr: Learning rate of both.
        betas: Of AdamW.
        eps: Of AdamW.
        momentum: Of Muon.
        weight_decay: Decoupled, of both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for group in params:
            named = list(group["params"])
            for use_muon in (True, False):
                part = [(n, p) for n, p in named if use_muon == (p.ndim == 2 and not _is_edge(n))]
                if part:
                    groups.append({**group, "params": part, "use_muon": use_muon})
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        muon, adamw = (
            [g for g in self.param_groups if g["use_muon"] == use_muon]
            for use_muon in (True, False)
        )
        self._parts: list[Optimizer] = []
        if muon:
            self._parts.append(
                torch.optim.Muon(
                    muon,
                    lr=lr,
                    momentum=momentum,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if adamw:
            self._parts.append(
                torch.optim.AdamW(
                    adamw, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay
                )
            )
        # The parts have filled in their own options; from here on they step on our groups.
        self.param_groups = [g for part in self._parts for g in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with both.

        Args:
            closure: Evaluates the loss again, with gradients.

        Returns:
            The loss of the closure, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            is_muon = isinstance(part, torch.optim.Muon)
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g["use_muon"] == is_muon]
            part.step()
        return loss


def _is_edge(name: str) -> bool:
    return _BY_ADAMW.search(name) is not None
