"""Compiled programs are kept between two starts of a command, where it is said, or not at all."""

import os
import pathlib
import subprocess
import sys

import pytest

from activedpo_jax import programs
from activedpo_jax.flags import parse, read_config

START = """
import sys
from activedpo_jax import programs
programs.keep(sys.argv[1] if len(sys.argv) > 1 else programs.default_place())
import jax
import jax.numpy as jnp
jax.config.update("jax_explain_cache_misses", True)
import logging
logging.basicConfig(level="WARNING")
print(jax.jit(lambda x: x * 2 + 1)(jnp.arange(3)))
"""


MISS = "PERSISTENT COMPILATION CACHE MISS"


def start(caches: pathlib.Path, *arguments: str, **variables: str) -> str:
    """A process that compiles one short program; what it wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(caches), **variables}
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def kept(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*-cache"))


def test_a_second_start_compiles_nothing(tmp_path: pathlib.Path) -> None:
    first, place = start(tmp_path), tmp_path / "activedpo_jax" / "programs"
    found = kept(place)
    assert found and MISS in first
    second = start(tmp_path)
    assert MISS not in second
    assert kept(place) == found


def test_another_place_or_none(tmp_path: pathlib.Path) -> None:
    start(tmp_path, "")
    assert not list(tmp_path.iterdir())
    start(tmp_path, str(tmp_path / "there"))
    assert kept(tmp_path / "there") and not (tmp_path / "activedpo_jax").exists()


def test_what_jax_is_told_counts_more(tmp_path: pathlib.Path) -> None:
    start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert not (tmp_path / "activedpo_jax").exists()
    assert kept(tmp_path / "jax")


def test_a_place_that_cannot_be_written_stops_nobody(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    assert "[1 3 5]" in start(tmp_path, str(tmp_path / "file" / "programs"))


def test_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["main", "--config=configs/quickstart.py", "--workdir=runs/x"]
    assert parse(command, ["activedpo", "random"]).program_cache == str(tmp_path / "activedpo_jax" / "programs")
    assert parse([*command, "--program_cache="], ["activedpo", "random"]).program_cache == ""
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert programs.default_place() == str(pathlib.Path.home() / ".cache" / "activedpo_jax" / "programs")


def test_every_command_that_reads_its_flags_has_programs_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(programs, "keep", said.append)
    monkeypatch.setenv("XLA_FLAGS", "")
    for place in (str(tmp_path), ""):
        read_config(
            ["main", "--config=configs/quickstart.py", "--workdir=x", f"--program_cache={place}"],
            ["activedpo", "random"],
        )
    assert said == [str(tmp_path), ""] and "triton" in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize("flag", ["", "--xla_gpu_enable_triton_gemm=true"])
def test_triton_is_left_out_unless_somebody_asks_for_it(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=2 {flag}".strip())
    programs.compile_faster()
    programs.compile_faster()
    wanted = flag or "--xla_gpu_enable_triton_gemm=false"
    assert os.environ["XLA_FLAGS"] == f"--xla_force_host_platform_device_count=2 {wanted}"
