"""A step in which no parameter has a gradient: usually the model has other parameters by now."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def explain_missing_gradients(params: Sequence[Tensor], name: str) -> None:
    """Says that nothing was trained; called where no parameter has a gradient.

    Args:
        params: The optimizer's parameters.
        name: The first one's, for messages.

    Raises:
        RuntimeError: If a model was sharded after the optimizer was constructed: its gradients go to new
            parameters.
    """
    known = {id(param) for param in params}
    if any(
        param.grad is not None and id(param) not in known
        for module in _sharded_modules()
        for param in module.parameters(recurse=False)
    ):
        raise RuntimeError(
            f"Parameter {name} has no gradient, nor has any other: fully_shard was applied to a model after "
            "the optimizer was constructed, so that the gradients are those of new parameters. Call "
            "fully_shard first, and construct the optimizer with the sharded model's parameters and "
            "distributed_config=FullyShardDistributedConfig()."
        )
    warnings.warn(
        f"No parameter has a gradient (the first is {name}), so that this step changes nothing. Was the "
        "model wrapped or replaced after the optimizer was constructed, or frozen?",
        stacklevel=2,
    )


def _sharded_modules() -> list[torch.nn.Module]:
    """The modules that `fully_shard` manages, if it was ever imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return []
    # By type: to ask an object for its class makes some modules of torch warn.
    roots = [obj for obj in gc.get_objects() if issubclass(type(obj), fsdp.FSDPModule)]
    return [module for root in roots for module in root.modules()]
