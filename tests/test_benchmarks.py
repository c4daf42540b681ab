"""The benchmarks run, in small, and find PyTorch's side equal to ours: each of them compares before it times."""

import json
import pathlib
import subprocess
import sys

import pytest

SMALL = {
    "features": "--groups 2 --prompt 16 --response 8 --only summed response rows hooks torch_vmap peft",
    "training": "--factor 0.1 --batch 2 --batches 1",
    "training --loss sft": "--factor 0.1 --batch 3 --batches 1",
    "scoring": "--factor 0.1 --pairs 5 --chunk 2",
    "round": "--factor 0.1 --groups 6 --picks 4 --chunk 2",
    "round --on_policy": "--groups 4 --picks 2 --prompt 9 --response 5",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_sides_agree_and_are_timed(name: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "found.json"
    module, *options = name.split()
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{module}",
        *options,
        *SMALL[name].split(),
        "--layers=1",
        "--repeats=1",
    ]
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["on-policy" if "--on_policy" in options else module]
    assert len(found["results"]) >= (2 if module == "scoring" else 3) and found["useful tokens"] > 0
    assert all(len(several["seconds"]) == 1 for several in found["results"].values())
    if name == "features":
        assert set(found["differences"]) == {"hooks", "torch_vmap"}
        assert max(found["differences"].values()) < 1e-4
