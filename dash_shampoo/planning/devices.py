"""Peak rates of accelerators, and the roofline: the least time in which a device can do some work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_GPUS_PER_NODE = 8
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """Peak rates of an accelerator in a node of eight.

    Attributes:
        name: Short name.
        description: Product and memory.
        peak_flops: FLOP/s of dense matrix products by precision of the operands.
        memory_bandwidth: Bytes/s.
        memory_bytes: Size of the memory.
        node_bandwidth: Bytes/s between devices of a node, one direction.
        network_bandwidth: Bytes/s per device between nodes, one direction.
    """

    name: str
    description: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    memory_bytes: float
    node_bandwidth: float
    network_bandwidth: float

    def matmul_seconds(self, flops: float, num_bytes: float, precision: str) -> float:
        """The roofline: the longer of computing and of moving the bytes.

        Args:
            flops: Floating-point operations of matrix products.
            num_bytes: Bytes read from and written to the device's memory.
            precision: A key of `peak_flops`.

        Returns:
            A lower bound of the time in seconds.

        Raises:
            ValueError: If the device has no peak for the precision.
        """
        if precision not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise ValueError(f"{precision=} has no peak rate on {self.name}; it has {known}.")
        return max(flops / self.peak_flops[precision], num_bytes / self.memory_bandwidth)

    def gather_seconds(self, received_bytes: float, num_ranks: int, stride: int = 1) -> float:
        """The time of an all-gather by ranks r, r + stride, …, without latency.

        Within a node the bytes come over its own links. What comes from other nodes enters through
        the network adapters of those ranks that the group has in the node, each part once.

        Args:
            received_bytes: Bytes that each rank receives.
            num_ranks: Ranks that take part.
            stride: Distance between their numbers.

        Returns:
            A lower bound of the time in seconds.
        """
        if num_ranks <= 1:
            return 0.0
        in_node = min(num_ranks, max(1, _GPUS_PER_NODE // stride))
        from_outside = received_bytes * (num_ranks - in_node) / (num_ranks - 1)
        return max(
            received_bytes / self.node_bandwidth if in_node > 1 else 0.0,
            from_outside / (in_node * self.network_bandwidth),
        )


def _peaks(*, fp64: float, fp32: float, tf32: float, half: float) -> dict[str, float]:
    peaks = {"fp64": fp64, "fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half}
    # Three fp16 products for one product of operands split into two halves.
    return {name: rate * _TERA for name, rate in {**peaks, "fp16x3": half / 3}.items()}


_HOPPER_PEAKS = _peaks(fp64=67.0, fp32=67.0, tf32=494.5, half=989.5)

DEVICES: Mapping[str, Device] = {
    # NVIDIA A100 Tensor Core GPU datasheet (June 2021), column A100 80GB SXM: fp64 tensor core 19.5,
    # fp32 19.5, tf32 156, bf16 and fp16 312 TFLOP/s dense; 2,039 GB/s; NVLink 600 GB/s in both
    # directions. NVIDIA DGX A100 datasheet: eight 200 Gb/s network adapters for eight GPUs.
    "A100": Device(
        name="A100",
        description="NVIDIA A100 SXM, 80 GB HBM2e",
        peak_flops=_peaks(fp64=19.5, fp32=19.5, tf32=156.0, half=312.0),
        memory_bandwidth=2039 * _GIGA,
        memory_bytes=80 * _GIGA,
        node_bandwidth=300 * _GIGA,
        network_bandwidth=25 * _GIGA,
    ),
    # NVIDIA H100 Tensor Core GPU datasheet (2023), column H100 SXM: fp64 tensor core 67, fp32 67,
    # tf32 989, bf16 and fp16 1,979 TFLOP/s, the last three with sparsity, so half of that for dense
    # matrices; 3.35 TB/s; NVLink 900 GB/s in both directions. NVIDIA DGX H100 datasheet: 400 Gb/s
    # network adapter per GPU.
    "H100": Device(
        name="H100",
        description="NVIDIA H100 SXM, 80 GB HBM3",
        peak_flops=_HOPPER_PEAKS,
        memory_bandwidth=3350 * _GIGA,
        memory_bytes=80 * _GIGA,
        node_bandwidth=450 * _GIGA,
        network_bandwidth=50 * _GIGA,
    ),
    # NVIDIA H200 Tensor Core GPU datasheet (2024), column H200 SXM: the rates of the H100 SXM, 4.8 TB/s
    # and 141 GB. NVIDIA DGX H200 datasheet: 400 Gb/s network adapter per GPU.
    "H200": Device(
        name="H200",
        description="NVIDIA H200 SXM, 141 GB HBM3e",
        peak_flops=_HOPPER_PEAKS,
        memory_bandwidth=4800 * _GIGA,
        memory_bytes=141 * _GIGA,
        node_bandwidth=450 * _GIGA,
        network_bandwidth=50 * _GIGA,
    ),
}

_PRECISION_OF_DTYPE = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def precision_of(dtype: torch.dtype, use_tf32: bool = False) -> str:
    """The precision in which torch multiplies matrices of a dtype.

    Args:
        dtype: A floating-point dtype.
        use_tf32: Whether float32 matrices are multiplied in TF32.

    Returns:
        A key of `Device.peak_flops`.
    """
    if use_tf32 and dtype == torch.float32:
        return "tf32"
    return _PRECISION_OF_DTYPE[dtype]
