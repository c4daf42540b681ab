"""How a command's programs are compiled, and that they are kept on disk, so that they are not compiled at every start.

Where the variable JAX_COMPILATION_CACHE_DIR is set, JAX's own settings of what is kept hold instead.
"""

import os
import pathlib

import jax

# Of all commands together; what was not used for longest goes first.
_MOST_BYTES = 4 * 2**30

# On GPUs, XLA also tries Triton kernels of its own for every matrix product.  Without them a program of features
# compiled in about half the time on an H100, and was no slower: see `benchmarks/README.md`.
_NO_TRITON = "--xla_gpu_enable_triton_gemm=false"


def default_place() -> str:
    """`activedpo_jax/programs` in the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return str(pathlib.Path(caches) / "activedpo_jax" / "programs")


def keep(place: str) -> None:
    """Has JAX keep every program that it compiles from now on, and look there before it compiles one.

    Args:
      place: a folder, which is made; empty: nothing is kept.
    """
    if not place:
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", place)
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
        # By default, programs that compile within a second are not kept, as most of a run's do.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_faster() -> None:
    """Sets what XLA need not try, before JAX starts it; a setting that is in XLA_FLAGS already stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _NO_TRITON.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_TRITON}".strip()
