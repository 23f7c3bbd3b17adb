"""The published figures of devices and their links. `farspan plan` takes measured ones in their place."""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 1 << 30  # vendors' "GB" of device memory are GiB within a percent


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator and its links.

    flops: peak floating-point operations a second in 16 bits, dense. memory: bytes. bandwidth: bytes a second
    of that memory. link_bandwidth, node_bandwidth: bytes a second that one rank sends in total, inside its
    node and to other nodes. latency, node_latency: seconds until an empty message has arrived. launch:
    seconds to start a kernel or a collective. utilisation: the part of ``flops`` that large matrix products
    and attention reach. per_node: devices of one node. host_bandwidth, disk_bandwidth: bytes a second from
    the host's memory and from a disk; without the first, the device's memory is the host's.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    link_bandwidth: float
    node_bandwidth: float
    latency: float = 3e-6
    node_latency: float = 8e-6
    launch: float = 5e-6
    utilisation: float = 0.6
    per_node: int = 8
    host_bandwidth: float | None = 64e9  # PCIe 5.0 x16, one way
    disk_bandwidth: float = 5e9  # of one NVMe disk on PCIe 4.0; no data sheet of the device


# From data sheets, SXM variants: dense bf16 TFLOP/s, TB/s, GB, NVLink one way (half of the advertised
# figure), and the network of the vendor's own 8-GPU server (A100: 200 Gbit/s a GPU; H100, H200, B200: 400
# Gbit/s).
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="A100",
            flops=312e12,
            bandwidth=2.039e12,
            memory=80 * _GIB,
            link_bandwidth=300e9,
            node_bandwidth=25e9,
            host_bandwidth=32e9,
        ),
        Device(
            name="H100",
            flops=989e12,
            bandwidth=3.35e12,
            memory=80 * _GIB,
            link_bandwidth=450e9,
            node_bandwidth=50e9,
        ),
        Device(
            name="H200",
            flops=989e12,
            bandwidth=4.8e12,
            memory=141 * _GIB,
            link_bandwidth=450e9,
            node_bandwidth=50e9,
        ),
        Device(
            name="B200",
            flops=2250e12,
            bandwidth=8e12,
            memory=180 * _GIB,
            link_bandwidth=900e9,
            node_bandwidth=50e9,
        ),
    )
}
