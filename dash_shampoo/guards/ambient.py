"""What surrounds a step, in one place: the optimizer's results depend on no ambient setting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

# Whether there is autocast of any device type; how many modes wrap torch's functions, as a default device
# does. These are not public, and cost a tenth of what is; a torch that lacks them takes the long way.
_is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_num_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)


def neutral(device_types: Callable[[], Collection[str]]) -> AbstractContextManager[None]:
    """Runs its body as if the program had set nothing, and restores what was set.

    Autocast rounds the products of factor matrices to half precision; a default dtype of bfloat16 makes
    bias corrections 0; a default device moves scalars there; tensors of inference mode can't be updated
    afterwards; a reduced precision of float32 products changes every result. Deterministic mode stays
    on: it changes which kernels run, and is meant.

    Args:
        device_types: Gives the device types of the parameters ("cpu", "cuda"), beside "cpu"; called only
            where something is set.

    Note:
        Only what differs from torch's defaults is touched, so that a plain program pays microseconds.
    """
    return torch.no_grad() if _is_plain() else _neutral(device_types())


def _is_plain() -> bool:
    """Whether the program has set nothing, but for the grad mode."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # see `_use_full_precision`
        return False
    return (
        precision == "highest"
        and torch.get_default_dtype() is torch.float32
        and not torch.is_inference_mode_enabled()
        and not _is_any_autocast_enabled()
        and not _num_function_modes()
    )


@contextmanager
def _neutral(device_types: Collection[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device_type in {"cpu", *device_types}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        _use_full_precision(stack)
        yield


def _use_full_precision(stack: ExitStack) -> None:
    """Float32 products outside the solvers in float32; the solvers have a precision of their own."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program uses the newer `fp32_precision` settings
        for backend in (torch.backends.cuda, torch.backends.mkldnn):
            matmul = backend.matmul
            if (value := matmul.fp32_precision) not in ("ieee", "none"):
                stack.callback(setattr, matmul, "fp32_precision", value)
                matmul.fp32_precision = "ieee"
        return
    if precision != "highest":
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
