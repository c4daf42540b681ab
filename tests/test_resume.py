"""Runs whose process is really killed go on as if nothing had happened."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

OPTIONS = {
    "strategies": "activedpo",
    "seeds": "0",
    "rounds": "3",
    "labels_per_round": "6",
    "synthetic.pool_pairs": "48",
    "synthetic.heldout_pairs": "24",
    "scratch.steps": "5",
    "features.dim": "64",
    "features.groups_per_chunk": "16",
    "dpo.epochs": "20",
    "dpo.batch_size": "4",
    "evaluation.pairs_per_chunk": "24",
}


def start(folder: pathlib.Path, mode: str, **more: Any) -> subprocess.Popen[str]:
    """The command line, as a user types it."""
    flags = [f"--config.{name}={value}" for name, value in (OPTIONS | {"round.mode": mode} | more).items()]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [
        sys.executable,
        "-m",
        "activedpo_jax.main",
        "--config",
        "configs/quickstart.py",
        "--workdir",
        str(folder),
    ]
    root = pathlib.Path(__file__).parents[1]
    return subprocess.Popen(
        [*command, *flags], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def record(folder: pathlib.Path) -> dict[str, Any]:
    """Everything that a run leaves behind, but for times."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for entry in summary["rounds"]:
        del entry["seconds"]
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "selected": {p.parent.name: p.read_text() for p in sorted(folder.glob("rounds/*/selected.jsonl"))},
        "metrics": [{k: v for k, v in m.items() if k != "time" and not k.startswith("seconds")} for m in metrics],
        "summary": summary,
    }


@pytest.mark.slow
def test_killed_runs_equal_the_uninterrupted_one_bit_for_bit(tmp_path: pathlib.Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, "staged"))

    # While the features of the first round are computed, and again while it trains.
    partial = killed / "partial" / "001"
    everything = {"checkpoint_minutes": 0}
    kill_when(start(killed, "staged", **everything), lambda: len(list(partial.glob("*/evidence*/0*-0*"))) > 1)
    kill_when(start(killed, "staged", **everything), lambda: len(list(partial.glob("*/training/0*-0*"))) > 0)
    assert not (killed / "checkpoints" / "1").exists()
    # After the labels of round 2 have come in, before anything was learnt from them.
    files = [killed / "rounds" / "002" / name for name in ("asked.jsonl", "labels.jsonl")]
    kill_when(start(killed, "staged"), files[1].exists)
    assert (killed / "checkpoints" / "1").exists() and not (killed / "checkpoints" / "2").exists()
    assert not (killed / "rounds" / "002" / "selected.jsonl").exists()
    written = [path.stat().st_mtime_ns for path in files]
    finish(start(killed, "staged"))
    assert [path.stat().st_mtime_ns for path in files] == written  # nobody was asked again
    assert record(killed) == record(whole)

    # And once all is done, the same command does nothing more.
    before = record(killed)
    finish(start(killed, "staged"))
    assert record(killed) == before

    # A finished run goes on where there are to be more rounds.
    longer = tmp_path / "longer"
    finish(start(longer, "staged", rounds=2))
    finish(start(longer, "staged", rounds=3))
    assert record(longer)["selected"] == record(whole)["selected"]
    assert record(longer)["adapter"] == record(whole)["adapter"]
    refused = start(longer, "staged", rounds=2)
    assert "rounds (was 3, now 2)" in refused.communicate(timeout=120)[0] and refused.returncode == 2


@pytest.mark.slow
def test_fused_run_killed_between_rounds(tmp_path: pathlib.Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, "fused"))
    kill_when(start(killed, "fused"), (killed / "checkpoints" / "1").exists)
    finish(start(killed, "fused"))
    assert record(killed) == record(whole)


def test_other_options_on_the_same_directory_are_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text('{"rounds": 3}')
    process = start(tmp_path, "fused")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "belongs to other options" in output and "Traceback" not in output
