"""The programs of the quickstart compile for a TPU that is not there."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")
def test_quickstart_compiles_for_v5e() -> None:
    command = [sys.executable, "-m", "activedpo_jax.main", "--config", "configs/quickstart.py"]
    root, environment = pathlib.Path(__file__).parents[1], os.environ | {"XLA_FLAGS": ""}
    mesh = ["--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = subprocess.run(
        [*command, *mesh, "--compile_only=v5e:4x4"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for program in ("base model step", "evaluation (4, 9)", "round, activedpo", "round, random"):
        assert program in done.stdout


def test_unknown_topology_is_an_error() -> None:
    pytest.importorskip("libtpu", reason="needs libtpu: pip install '.[tpu]'")
    command = [
        sys.executable,
        "-m",
        "activedpo_jax.main",
        "--config",
        "configs/quickstart.py",
        "--compile_only=v5e:9x9",
    ]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "v5e:9x9" in done.stderr and "Traceback" not in done.stderr
