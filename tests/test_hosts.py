"""Several processes: how they find each other, what passes between them, and that they come to what one comes to."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from activedpo_jax import cluster, flags, hosts
from activedpo_jax.errors import UsageError
from activedpo_jax.selection.strategies import STRATEGIES
from tests.test_resume import OPTIONS, record
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

ROOT = pathlib.Path(hosts.__file__).parents[1]
TINY = OPTIONS | {"dpo.epochs": 2, "rounds": 2}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("arguments", "environment", "source"),
    [
        ([], {}, None),
        (["--coordinator=a:1"], {}, "--coordinator"),
        (["--coordinator", "a:1"], {"SLURM_NTASKS": "4"} | SLURM, "--coordinator"),
        (["--workdir=--coordinator"], {}, None),
        ([], {"SLURM_NTASKS": "4"} | SLURM, "Slurm"),
        ([], {"SLURM_NTASKS": "1"} | SLURM, None),
        ([], {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # the batch script, outside of srun
        ([], {"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ([], {"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "c"}, "GKE"),
        ([], {"TPU_WORKER_HOSTNAMES": "a"}, None),
        ([], {"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ([], {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_what_says_that_there_are_several(
    arguments: Sequence[str], environment: Mapping[str, str], source: str | None
) -> None:
    assert cluster.detected(arguments, {"JAX_PLATFORMS": "cpu"} | dict(environment)) == source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator=a:1"], "--coordinator=a:1: expected --coordinator, --num_processes and --process_id, or none"),
        (["--num_processes=2", "--process_id=0"], "--num_processes=2 --process_id=0: expected --coordinator"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "--coordinator: got 'a', expected HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "expected a --process_id from 0, below"),
    ],
)
def test_addresses_that_make_no_sense(arguments: list[str], message: str) -> None:
    command = ["main", "--config=configs/quickstart.py", "--workdir=x", *arguments]
    with pytest.raises(UsageError) as raised:
        flags.parse(command, STRATEGIES)
    assert message in str(raised.value)


def test_the_odd_one_out() -> None:
    same = {"a": "1", "b": "2"}
    assert hosts.odd_ones_out([same, same, same]) == []
    assert hosts.odd_ones_out([same, same | {"b": "3"}, same]) == [1]
    assert hosts.odd_ones_out([same | {"a": "0"}, same, same]) == [0]
    assert hosts.odd_ones_out([{"a": "1"}, {"b": "2"}, {"a": "1", "b": "2"}]) == []  # parts of different shards
    assert hosts.odd_ones_out([{"a": "1"}, {"b": "2"}, {"a": "1", "b": "4"}]) == [2]


def test_a_fingerprint_sees_one_bit() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    changed, moved = x.copy(), x.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    moved[[0, 1]] = moved[[1, 0]]
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
        found = [hosts.fingerprints({"w": jnp.asarray(a, dtype)}) for a in (x, x.copy(), moved)]
        assert found[0] == found[1] != found[2]
    assert hosts.fingerprints(jnp.asarray(changed)) != hosts.fingerprints(jnp.asarray(x))
    assert hosts.fingerprints([1, "a"]) != hosts.fingerprints([1, "b"])


def test_one_process_is_alone() -> None:
    part = np.arange(3, dtype=np.uint8)
    assert hosts.is_first() and not hosts.several() and hosts.any_of(True) and not hosts.any_of(False)
    assert [x.tolist() for x in hosts.exchange(part)] == [[0, 1, 2]]
    assert hosts.on_first(lambda x: x + 1)(2) == 3
    hosts.agree("round 1", {"picks": [1]})


# Real processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def processes(command: Sequence[str], count: int, devices: int, **environment: str) -> list["subprocess.Popen[str]"]:
    """A command of the package started `count` times, as the processes of one run with so many devices each."""
    port = free_port()
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"

    def start(number: int) -> "subprocess.Popen[str]":
        address = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={number}"]
        return subprocess.Popen(
            [sys.executable, *command, *(address if count > 1 else ())],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return [start(number) for number in range(count)]


class Run:
    """The processes of one run, as a user starts them.

    Args:
      count: of processes; devices: of each.
      options: to change; `config`: the file of the others.
    """

    def __init__(self, folder: pathlib.Path, count: int, devices: int, **options: Any) -> None:
        config = options.pop("config", "configs/quickstart.py")
        arguments = [f"--config.{name.replace('__', '.')}={value}" for name, value in (TINY | options).items()]
        command = ["-m", "activedpo_jax.main", f"--config={config}", f"--workdir={folder}", *arguments]
        self.processes = processes(command, count, devices)

    def end(self, code: int = 0) -> list[tuple[str, str]]:
        """What every process wrote on stdout and stderr until it ended, each with this exit code."""
        written = [process.communicate(timeout=400) for process in self.processes]
        assert [process.returncode for process in self.processes] == [code] * len(written), written
        return written

    def wait_for(self, path: pathlib.Path) -> None:
        deadline = time.monotonic() + 300
        while not path.exists():
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.005)


def adapter(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def picks(folder: pathlib.Path) -> list[tuple[str, str]]:
    lines = [line for file in sorted(folder.glob("rounds/*/selected.jsonl")) for line in file.read_text().splitlines()]
    return [(row["pair_id"], row["preference"]) for row in map(json.loads, lines)]


class Alone:
    def __init__(self, place: pathlib.Path) -> None:
        self.folder = place / "run"
        Run(self.folder, 1, 1, round__mode="staged").end()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """A run of one process with one device, which nothing disturbed."""
    return Alone(tmp_path_factory.mktemp("alone"))


def close(folder: pathlib.Path, other: pathlib.Path) -> None:
    """Holds two runs to the same picks and labels, and to adapters within 1e-5."""
    assert picks(folder) == picks(other) and len(picks(folder)) == 12
    ours, theirs = adapter(folder), adapter(other)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "options"),
    [
        (2, 4, {"round__mode": "staged", "mesh__data": 1, "mesh__fsdp": -1}),
        (4, 1, {"round__mode": "fused"}),
    ],
    ids=["two, staged, fsdp", "four, fused, data"],
)
def test_several_processes_come_to_what_one_comes_to(
    alone: Alone, tmp_path: pathlib.Path, count: int, devices: int, options: dict[str, Any]
) -> None:
    written = Run(tmp_path / "run", count, devices, **options).end()
    close(tmp_path / "run", alone.folder)
    assert written[0][0].startswith(f"{count} processes (--coordinator), {count * devices} devices\n")
    assert all("round" not in out for out, _ in written[1:])  # process 0 alone says what happens


KEYS = ("pair_id", "prompt", "first", "second", "first_tokens", "second_tokens", "responses", "tokens")
WORDS = ["red", "blue", "green", "cold", "warm", "tall", "deep", "soft", "loud", "late"]


def written_data(folder: pathlib.Path) -> str:
    """A config of preferences in files, with a model of Hugging Face's formats; its path."""
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tiny_llama(folder / "base", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder / "base")
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    for name, count in (("train", 37), ("heldout", 9)):
        rows = [
            {"prompt": f"{name} {i} {text(1, 9)}", "chosen": text(3, 6), "rejected": text(1, 6)} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.py").write_text(
        "from activedpo_jax.config import default\n\n\n"
        "def get_config():\n"
        "    config = default()\n"
        f"    config.model.path = {str(folder / 'base')!r}\n"
        f"    config.data.train = {str(folder / 'train.jsonl')!r}\n"
        f"    config.data.heldout = {str(folder / 'heldout.jsonl')!r}\n"
        "    config.data.buckets = ((64, 32), (128, 64))\n"
        "    return config\n"
    )
    return str(folder / "config.py")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["files", "policy"])
def test_two_processes_share_the_reading_and_the_responding(tmp_path: pathlib.Path, source: str) -> None:
    """Each tokenises a part of the files, and samples the responses to a part of the prompts."""
    options: dict[str, Any] = {"round__mode": "staged"}
    if source == "files":
        options["config"] = written_data(tmp_path)
    else:
        options |= {
            "candidates__source": "policy",
            "oracle__kind": "reward",
            "generation__responses": 3,
            "generation__max_new_tokens": 6,
        }
    Run(tmp_path / "alone", 1, 1, **options).end()
    Run(tmp_path / "two", 2, 2, **options).end()
    close(tmp_path / "two", tmp_path / "alone")
    names = [path.relative_to(tmp_path / "two").as_posix() for path in (tmp_path / "two").glob("rounds/*/*.jsonl")]
    assert ("rounds/001/responses.jsonl" in names) == (source == "policy")
    for name in names:
        lines = [(tmp_path / run / name).read_text().splitlines() for run in ("two", "alone")]
        texts = [[[row.get(key) for key in KEYS] for row in map(json.loads, some)] for some in lines]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_resumes(alone: Alone, tmp_path: pathlib.Path) -> None:
    folder, options = tmp_path / "run", {"round__mode": "staged", "checkpoint_minutes": 0}
    for victim, moment in ((0, folder / "partial" / "001"), (1, folder / "rounds" / "002" / "asked.jsonl")):
        run = Run(folder, 2, 1, **options)
        run.wait_for(moment)
        run.processes[victim].send_signal(signal.SIGKILL)
        (_, error) = run.processes[1 - victim].communicate(timeout=200)
        assert run.processes[1 - victim].returncode == 75, error
        assert error.splitlines()[-1].startswith("error: another process of this run has ended"), error
        run.processes[victim].communicate()
    run = Run(folder, 2, 1, **options)
    run.wait_for(folder / "rounds" / "002" / "labels.jsonl")
    run.processes[1].send_signal(signal.SIGTERM)  # as where one host alone is pre-empted
    run.end(75)
    run = Run(folder, 2, 1, **options)
    run.end()
    close(folder, alone.folder)
    assert not (folder / "partial").exists()
    before = record(folder)
    Run(folder, 2, 1, **options).end()  # nothing more is to be done
    assert record(folder) == before


@pytest.mark.slow
def test_an_error_of_process_0_is_everybodys(alone: Alone, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    written = Run(folder, 2, 1).end(2)
    assert all("expected a run's options" in error for _, error in written)


@pytest.mark.slow
def test_people_are_asked_once_and_everybody_hears(alone: Alone, tmp_path: pathlib.Path) -> None:
    folder, options = tmp_path / "run", {"rounds": 1, "oracle__kind": "people"}
    written = Run(folder, 2, 1, **options).end()
    assert "0 of 6 pairs are labelled" in written[0][0]
    asked = [json.loads(line) for line in (folder / "rounds" / "001" / "asked.jsonl").read_text().splitlines()[1:]]
    rows = [{"pair_id": row["pair_id"], "preference": "second"} for row in asked]
    answers = folder / "rounds" / "001" / "label" / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Run(folder, 2, 1, **options).end()
    assert picks(folder) == [(row["pair_id"], "second") for row in asked]
    assert (folder / "adapter" / "adapter_config.json").exists()
