"""Peak rates of accelerators, from their makers' public documents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
_DGX_A100 = "https://www.nvidia.com/en-us/data-center/dgx-a100/"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_DGX_H100 = "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"
_V5P = "https://docs.cloud.google.com/tpu/docs/v5p"
_V6E = "https://docs.cloud.google.com/tpu/docs/v6e"  # compares v6e with v5e


@dataclass(frozen=True)
class Chip:
    """Peak rates of one accelerator. Rates of links are those of one direction.

    Attributes:
        description: name of the product.
        flops: FLOPs per second of dense bfloat16 products.
        bandwidth: bytes per second of the memory.
        memory: bytes of the memory.
        link: bytes per second of all links between chips of a domain.
        domain: number of chips that these links connect.
        network: bytes per second between domains.
        sources: document of each figure.
        kinds: names of devices with this rate, as JAX reports them in `device_kind`.
    """

    description: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    domain: int
    network: float
    sources: Mapping[str, str]
    kinds: tuple[str, ...] = ()


def _sources(chip: str, system: str) -> dict[str, str]:
    of_chip: dict[str, Any] = dict.fromkeys(("flops", "bandwidth", "memory", "link"), chip)
    return of_chip | dict.fromkeys(("domain", "network"), system)


CHIPS: dict[str, Chip] = {
    "a100": Chip(
        "NVIDIA A100 SXM 80 GB; NVLink within 8, InfiniBand of 200 Gb/s per GPU",
        312e12, 2.039e12, 80e9, 300e9, 8, 25e9, _sources(_A100, _DGX_A100),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"),
    ),
    "h100": Chip(
        "NVIDIA H100 SXM 80 GB; NVLink within 8, InfiniBand of 400 Gb/s per GPU",
        989.4e12, 3.35e12, 80e9, 450e9, 8, 50e9, _sources(_H100, _DGX_H100),
        ("NVIDIA H100 80GB HBM3",),
    ),
    "h200": Chip(
        "NVIDIA H200 SXM 141 GB; NVLink within 8, InfiniBand of 400 Gb/s per GPU",
        989.4e12, 4.8e12, 141e9, 450e9, 8, 50e9, _sources(_H200, _DGX_H100),
        ("NVIDIA H200",),
    ),
    "v5e": Chip(
        "Google TPU v5e; ICI within a pod of 256, 200 Gb/s per host of 8",
        197e12, 0.8e12, 16e9, 200e9, 256, 3.125e9, _sources(_V6E, _V6E),
        ("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(
        "Google TPU v5p; ICI within a pod of 8,960, 50 Gb/s per chip",
        459e12, 2.765e12, 95e9, 600e9, 8960, 6.25e9, _sources(_V5P, _V5P),
        ("TPU v5", "TPU v5p"),
    ),
    "v6e": Chip(
        "Google TPU v6e; ICI within a pod of 256, 800 Gb/s per host of 8",
        918e12, 1.6e12, 32e9, 400e9, 256, 12.5e9, _sources(_V6E, _V6E),
        ("TPU v6 lite", "TPU v6e"),
    ),
}  # fmt: skip


def find_chip(kind: str) -> Chip | None:
    """Return the chip that JAX reports as `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
