"""Gives every test eight simulated devices; has to run before JAX is imported."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # tests compile much and compute little: three times faster
    ]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"  # elsewhere an installed libtpu looks for its TPU first

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module_at_a_time() -> Iterator[None]:
    """Every compiled program has memory maps of its own, and a process that is given no more of them (65,530 on Linux)
    dies in the compiler."""
    yield
    jax.clear_caches()
