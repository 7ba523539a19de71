"""Memory of a model's step, counted on tensors without memory: any model, no device needed.

The forward and the backward pass run in torch's fake mode, in which tensors have shapes and dtypes only,
and every storage is counted while it lives. So the counts are those of an eager step; a compiled model
takes less. Kernels' own workspaces, cached blocks of the allocator and the CUDA context come on top.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.memory import Allocations


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of a model and of its passes over one micro-batch.

    Attributes:
        parameters: Its parameters and buffers.
        gradients: Of those that need them.
        training: What a forward and a backward pass hold at most beside parameters and gradients.
        validation: What a forward pass without gradients, and its loss, hold at most.
        largest_unit: Parameters of the largest of its ``blocks``, which `fully_shard` gathers.
    """

    parameters: int
    gradients: int
    training: int
    validation: int
    largest_unit: int


def model_memory(
    make: Callable[[], nn.Module], batch_size: int, length: int, use_bf16: bool
) -> ModelMemory:
    """Count the memory of a model's passes.

    Args:
        make: Makes the model: integer tokens (B, T) to logits (B, T, vocabulary).
        batch_size: B, sequences of a forward pass of a process.
        length: T.
        use_bf16: Whether the forward pass runs under autocast to bf16.

    Returns:
        The bytes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = make()
        parameters = list(model.parameters())
        tokens = torch.zeros(batch_size, length + 1, dtype=torch.int64)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
                logits = model(tokens[:, :-1])
                return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        with Allocations() as training:
            value = loss()
            forward = training.memory.peak
            torch.autograd.backward(value)
            del value
        gradients = _bytes([p for p in parameters if p.requires_grad])
        model.eval()
        with torch.no_grad(), Allocations() as validation:
            loss()
    units = [_bytes(list(block.parameters())) for block in getattr(model, "blocks", ())]
    return ModelMemory(
        parameters=_bytes([*parameters, *model.buffers()]),
        gradients=gradients,
        training=max(forward, training.memory.peak - gradients),
        validation=validation.memory.peak,
        largest_unit=max(units, default=_bytes(parameters)),
    )


def _bytes(tensors: list[nn.Parameter] | list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
