"""How operands are rounded, and how products stay clear of torch's process-wide precision settings."""

from __future__ import annotations

import contextlib
import platform
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

MatmulPrecision = Literal["fp32", "fp16x3", "tf32", "fp16", "bf16"]
"""Precision of the operands of a product; sums are always fp32.

"fp32" means the factor matrix's own dtype, so float64 stays float64, and never TF32. "fp16x3" splits
each operand into two fp16 numbers, which keeps 22 bits, and multiplies three times.
"""

HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of the second half of a split operand: it keeps the half clear of fp16's smallest numbers.
SPLIT_SCALE = 2048.0
# Above what rounding leaves of fp32 products, far below TF32's 5e-4.
_FP32_ERROR = 1e-5
# m·k·n of a whole batch up to which torch gives fp32 products to BLAS in any case.
_MAX_SIZE_OF_BLAS = 16**3

# torch has process-wide switches for the precision of fp32 products, and no argument for it.
_lock = threading.RLock()
_num_exact = 0
_setting_outside: str | None = None


def can_use_half_operands(A: Tensor) -> bool:
    """Whether torch multiplies half-precision operands into an fp32 result on A's device."""
    return A.is_cuda and A.dtype == torch.float32 and torch.version.hip is None


def round_to_tf32(A: Tensor) -> Tensor:
    """Round float32 values to TF32's 10 bits of mantissa, ties to even.

    Args:
        A: float32 tensor of any shape, finite.

    Returns:
        A new float32 tensor of the same shape.

    Examples:
        >>> round_to_tf32(torch.tensor([1.0, 1.0 + 2.0**-10, 1.0 + 2.0**-12])).tolist()
        [1.0, 1.0009765625, 1.0]
    """
    bits = A.contiguous().view(torch.int32)
    last_kept = (bits >> 13) & 1
    return ((bits + (last_kept + 0xFFF)) & ~0x1FFF).view(torch.float32)


def rounded(A: Tensor, precision: MatmulPrecision) -> Tensor:
    """An operand at a precision.

    Args:
        A: (..., N, K) operand; one that was rounded before comes back as it is.
        precision: The precision.

    Returns:
        The rounded operand, on CUDA in the half dtype itself; `A` for "fp32" and "fp16x3".
    """
    if precision in ("fp32", "fp16x3"):
        return A
    if HALVES.get(A.dtype) == precision:
        return A
    if precision in HALVES.values():
        half = A.to(torch.float16 if precision == "fp16" else torch.bfloat16)
        return half if can_use_half_operands(A) else half.to(A.dtype)
    if A.is_cuda and A.dtype == torch.float32:
        return A  # the tensor cores round
    return round_to_tf32(A.float()).to(A.dtype)


def split(A: Tensor) -> tuple[Tensor, Tensor]:
    """A as high + low/`SPLIT_SCALE`, both of fp16's 11 bits; on CUDA in fp16 itself."""
    high = A.to(torch.float16)
    low = ((A - high) * SPLIT_SCALE).to(torch.float16)
    if can_use_half_operands(A):
        return high, low
    return high.to(A.dtype), low.to(A.dtype)


def is_tf32_allowed() -> bool:
    """Whether the program allows TF32 for fp32 products on CUDA."""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # the program uses the newer `fp32_precision` setting
        return bool(matmul.fp32_precision == "tf32")


@contextlib.contextmanager
def tf32_switch(is_allowed: bool) -> Iterator[None]:
    """Set CUDA's TF32 switch for one product, only where it stands otherwise.

    The switch is read when the product is launched, so it is held for microseconds. Another
    thread that launches an fp32 product in this very window sees it; our own threads wait.
    """
    matmul = torch.backends.cuda.matmul
    with _lock:
        if is_tf32_allowed() == is_allowed:
            yield
            return
        # torch has an older and a newer setting, and refuses to read the one when the other was
        # changed alone; so the one in use is changed, and both are put back.
        fp32_precision = getattr(matmul, "fp32_precision", None)
        try:
            float32_matmul_precision = torch.get_float32_matmul_precision()
            is_legacy = isinstance(matmul.allow_tf32, bool)
        except RuntimeError:
            is_legacy = False
        try:
            if is_legacy:
                matmul.allow_tf32 = is_allowed
            else:
                matmul.fp32_precision = "tf32" if is_allowed else "ieee"
            yield
        finally:
            if is_legacy:
                torch.set_float32_matmul_precision(float32_matmul_precision)
            if fp32_precision is not None:
                matmul.fp32_precision = fp32_precision


@contextlib.contextmanager
def exact_products(device: torch.device, size: int = 0) -> Iterator[None]:
    """Fp32 products on the CPU are fp32, also where `set_float32_matmul_precision` says otherwise.

    "medium" and "high" let oneDNN round the operands of fp32 products to bf16 or TF32 where the CPU has
    units for it. The setting is read in every product and by every thread, so it is set once around
    many of them, by the first thread that comes, and put back by the last one.

    Args:
        device: Of the operands; elsewhere than on the CPU nothing is set.
        size: m·k·n of the smallest product in the body, (m, k) by (k, n), for the faster of two libraries
            where both are exact. It is asked for because torch chooses by the work of a whole batch, and
            no block's result may depend on how many others there are. Default: the one that takes all.
    """
    global _num_exact, _setting_outside
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if device.type != "cpu" or not hasattr(matmul, "fp32_precision"):
        yield
        return
    with _lock:
        if _num_exact == 0:
            found = str(matmul.fp32_precision)
            wanted = _FASTEST_EXACT if size > _MAX_SIZE_OF_BLAS else "ieee"
            is_set = found == wanted or (found == "none" and wanted == "ieee")
            _setting_outside = None if is_set else found
            if _setting_outside is not None:
                matmul.fp32_precision = wanted
        _num_exact += 1
    try:
        yield
    finally:
        with _lock:
            _num_exact -= 1
            if _num_exact == 0 and _setting_outside is not None:
                matmul.fp32_precision = _setting_outside


@contextlib.contextmanager
def plain_products(device: torch.device, size: int = 0) -> Iterator[None]:
    """`exact_products` out of autocast, which would take them down to half precision, unasked.

    Args:
        device: Of the operands.
        size: As of `exact_products`.
    """
    can_autocast = torch.amp.is_autocast_available(device.type)
    outside = torch.autocast(device.type, enabled=False) if can_autocast else nullcontext()
    with outside, exact_products(device, size):
        yield


def _fastest_exact_setting() -> str:
    """The value of `torch.backends.mkldnn.matmul.fp32_precision` whose fp32 products are fp32, and fast.

    "ieee" leaves fp32 products to the BLAS that torch was built with. MKL multiplies with half of the
    vector width on CPUs that are not Intel's. "bf16" leaves them to oneDNN, which has the whole, and rounds
    no operand where the CPU has no units for that: 1.8 to 2.3 times as fast from N = 32 on, on an AMD
    EPYC with AVX-512. It is taken on such CPUs alone, after a look at what its products are.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (has_mkl and is_wide and _is_from_amd() and hasattr(matmul, "fp32_precision")):
        return "ieee"
    found = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return "bf16" if all(_product_error(size) < _FP32_ERROR for size in (64, 128)) else "ieee"
    finally:
        matmul.fp32_precision = found


def _is_from_amd() -> bool:
    name = platform.processor()
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as file:
        name += file.read(1024)  # the first core's vendor
    return "AuthenticAMD" in name


def _product_error(size: int) -> float:
    """Relative error of an fp32 product of numbers that bf16 and TF32 lack."""
    A = torch.linspace(-1.0, 1.0, 2 * size * size, dtype=torch.float64, device="cpu").sin().float()
    A = A.view(2, size, size)
    exact = torch.bmm(A.double(), A.double())
    return float((torch.bmm(A, A) - exact).norm() / exact.norm())


# Settled at import: a step may run where tensors hold no data.
_FASTEST_EXACT = _fastest_exact_setting()
