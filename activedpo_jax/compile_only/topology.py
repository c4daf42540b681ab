"""The devices to compile for: of a TPU that is not there, of this machine's CPU in any number, of its GPUs."""

import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


class Topology(NamedTuple):
    """What `--compile_only` names."""

    slices: int
    platform: str  # cpu, gpu, or a generation of TPUs
    shape: str  # in chips, `4x4`; for CPU and GPU the number of devices


def parse(text: str) -> Topology:
    """`2*v5e:4x4` in its parts; `flags` has checked the form."""
    slices, _, rest = text.rpartition("*")
    platform, _, shape = rest.partition(":")
    return Topology(int(slices or 1), platform, shape)


def find_devices(text: str) -> list[Any]:
    """The devices of a topology such as `v5e:4x4`, `2*v5e:4x4`, `cpu:8` or `gpu:1`.

    Raises:
      ValueError: nothing here compiles for it; says what would.
    """
    topology = parse(text)
    if topology.platform not in ("cpu", "gpu"):
        return tpu_devices(text)
    if topology.slices != 1 or not topology.shape.isdigit():
        raise ValueError(f"--compile_only={text}: expected {topology.platform}:NUMBER, as in {topology.platform}:8")
    count = int(topology.shape)
    return _cpu_devices(text, count) if topology.platform == "cpu" else _gpu_devices(text, count)


def tpu_devices(text: str) -> list[Any]:
    """The devices of a TPU topology, one slice or several.

    Raises:
      ValueError: libtpu is not installed, or does not know the topology.
    """
    slices, platform, shape = parse(text)
    # Otherwise libtpu looks for the metadata of a TPU machine, and takes minutes to give up.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is touched, so two may compile at a time
    }.items():
        os.environ.setdefault(name, value)
    several: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{platform}:{shape}", **several)
    except Exception as error:  # JAX raises whatever libtpu, or its absence, leads to
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--compile_only={text}: {reason}; expected a topology that libtpu knows, such as v5e:4x4 or v5p:2x2x2, "
            "cpu:NUMBER or gpu:NUMBER, and libtpu (pip install 'activedpo_jax[tpu]')"
        ) from error
    return list(found.devices)


def _cpu_devices(text: str, count: int) -> list[Any]:
    """Simulated devices, as many as wanted unless JAX has been in use before."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # devices are there already
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--compile_only={text}: this process has {len(devices)} CPU devices; expected {count}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}, or unset what sets another number there"
        )
    return devices[:count]


def _gpu_devices(text: str, count: int) -> list[Any]:
    """XLA compiles for GPUs that it finds: which library calls and kernels it chooses is tried out on them."""
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        devices = []
    if len(devices) < count:
        raise ValueError(
            f"--compile_only={text}: JAX sees {len(devices)} GPUs here, and XLA compiles for attached GPUs alone, "
            "unlike for TPUs; expected a machine with that many GPUs of the kind that the run is for (pip install "
            "'activedpo_jax[gpu]')"
        )
    return devices[:count]


def num_chips(devices: list[Any]) -> int:
    """Some generations have two devices a chip, which share its coordinates."""
    if devices[0].platform != "tpu":
        return len(devices)
    return len({(getattr(d, "slice_index", 0), tuple(d.coords)) for d in devices})


def memory_limit(device: Any) -> float | None:
    """Bytes of a device that a program may take; None: the compiler sets no limit, as on CPUs.

    TPU compilers know it and say it in the error about a program that needs more, so one is compiled that does.
    """
    if device.platform == "gpu":
        return float((device.memory_stats() or {}).get("bytes_limit", 0)) or None
    if device.platform != "tpu":
        return None
    huge = jax.ShapeDtypeStruct((2**22, 2**20), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.square).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return available_bytes(str(error))
    return None


def available_bytes(message: str) -> float | None:
    """The number in `exceeds available HBM (15.75G)` or `Used 22.10G of 15.75G hbm`."""
    found = re.search(r"available HBM \(([\d.]+)([KMGT])\)", message) or re.search(
        r"Used [\d.]+[KMGT] of ([\d.]+)([KMGT])", message
    )
    return _bytes(found[1], found[2]) if found else None


def used_bytes(message: str) -> float | None:
    """What a program needs, of the same messages."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(
        r"(?:required|need)[^()]*\(([\d.]+)([KMGT])\)", message
    )
    return _bytes(found[1], found[2]) if found else None


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024.0 ** ("KMGT".index(unit) + 1)
