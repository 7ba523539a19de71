"""The bytes that an optimizer's state takes in this process."""

import torch
from torch.distributed.tensor import DTensor

from dash_shampoo.planning import SHARED


def _tensors_of(value):
    """All tensors of a nested state, with the innermost name above each."""
    found = []

    def visit(value, name):
        if isinstance(value, torch.Tensor):
            found.append((name, value.to_local() if isinstance(value, DTensor) else value))
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, name if str(key).isdigit() else str(key))

    visit(value, "")
    return found


def real_bytes(optimizer):
    """Bytes of the state by kind; what parameters share counts once."""
    state = optimizer.state_dict()["state"]
    shared, kinds = {}, {}
    for param_state in state.values():
        for key, value in param_state.items():
            if isinstance(value, torch.Tensor):
                shared[value.data_ptr()] = value
                continue
            for kind, tensor in _tensors_of({key: value}):
                kinds[kind] = kinds.get(kind, 0) + tensor.numel() * tensor.element_size()
    kinds[SHARED] = sum(t.numel() * t.element_size() for t in shared.values())
    return kinds
