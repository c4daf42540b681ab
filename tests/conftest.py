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
