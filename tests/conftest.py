"""Gives every test eight simulated devices, and all processes of a session one cache of compiled programs.

Has to run before JAX is imported.
"""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # tests compile much and compute little: three times faster
        "--xla_gpu_enable_triton_gemm=false",  # as commands set it, so that their programs are those of tests
    ]
).strip()
# The workers of pytest-xdist, and the commands that tests start, inherit the cache from the process that makes it.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
if _CACHE not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="activedpo_jax_tests_")
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["JAX_PLATFORMS"] = "cpu"  # elsewhere an installed libtpu looks for its TPU first

from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402


def clear_programs() -> None:
    """Every compiled program has memory maps of its own, and a process that is given no more of them (65,530 on Linux)
    dies in the compiler."""
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module_at_a_time() -> Iterator[None]:
    yield
    clear_programs()


@pytest.fixture(autouse=True)
def programs_of_one_slow_test_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("slow"):
        clear_programs()
