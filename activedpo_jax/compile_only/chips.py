"""Peak numbers of chips, as their makers publish them.  They are not measurements: no program reaches them."""

from typing import NamedTuple


class Chip(NamedTuple):
    """What one chip can do at best."""

    flops: float  # FLOP/s of bfloat16 matrix products, without sparsity
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    interconnect: float  # bytes/s to the chips beside it, one way, over all of its links
    source: str


_TPU = "cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA's data sheet"

# By the start of JAX's `device_kind`; the first that fits counts.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32e9, 1.2e12, 300e9, f"{_TPU}/v4"),
    "TPU v5 lite": Chip(197e12, 16e9, 0.819e12, 200e9, f"{_TPU}/v5e"),
    "TPU v5": Chip(459e12, 95e9, 2.765e12, 600e9, f"{_TPU}/v5p"),
    "TPU v6 lite": Chip(918e12, 32e9, 1.638e12, 400e9, f"{_TPU}/v6e"),
    "TPU7x": Chip(2307e12, 192e9, 7.38e12, 600e9, f"{_TPU}/tpu7x"),
    "NVIDIA A100": Chip(312e12, 80e9, 2.039e12, 300e9, f"{_NVIDIA}, A100 80GB SXM"),
    "NVIDIA H100": Chip(989e12, 80e9, 3.35e12, 450e9, f"{_NVIDIA}, H100 SXM"),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9, f"{_NVIDIA}, H200 SXM"),
}


def find(device_kind: str) -> Chip | None:
    """The chip of a device; None: no peak numbers are known, as of CPUs."""
    return next((chip for name, chip in CHIPS.items() if device_kind.startswith(name)), None)
