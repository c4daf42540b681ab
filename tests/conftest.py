"""Gives every test eight simulated devices; has to run before JAX is imported."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"  # elsewhere an installed libtpu looks for its TPU first
