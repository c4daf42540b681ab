"""A TPU pod of two workers, as stubs: what launch/tpu_pod.sh does when something goes wrong."""

import os
import pathlib
import signal
import subprocess
import tarfile

import pytest

from tests import launch_bench
from tests.launch_bench import AWKWARD, Bench
from tests.test_launch import BUCKET, CONFIG, TPU, program, wait_for


@pytest.fixture
def bench(tmp_path: pathlib.Path) -> Bench:
    return launch_bench.make(tmp_path)


def launch(bench: Bench, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return bench.launch("tpu_pod.sh", *TPU, *words, CONFIG, BUCKET, *AWKWARD, **variables)


def verbs(bench: Bench) -> list[str]:
    """What gcloud was told to do, looks at the state left out."""
    found = [" ".join(call[2:4]) for call in bench.recorded("gcloud")]
    return [verb.split()[1] for verb in found if not verb.endswith(" list")]


ONCE = ["create", "scp", "ssh", "ssh", "delete"]  # the first ssh installs, the second runs


def test_a_run_from_request_to_deletion(bench: Bench) -> None:
    done = launch(bench, "--spot", "--create_flag=--internal-ips", "--ssh_flag=--internal-ip")
    assert done.returncode == 0, done.stderr
    assert verbs(bench) == ONCE
    assert bench.runs() == [program(BUCKET)] * 2
    calls = {call[3]: call for call in bench.recorded("gcloud")}
    assert {"--spot", "--node-id=my-run", "--internal-ips"} <= set(calls["create"])
    assert {"--worker=all", "--internal-ip"} <= set(calls["ssh"]) & set(calls["scp"])
    assert {"--force", "--quiet"} <= set(calls["delete"])
    assert all({"--project=my-project", "--zone=us-west4-a"} <= set(call) for call in bench.recorded("gcloud"))


def test_the_repository_goes_along_without_what_git_ignores(bench: Bench) -> None:
    assert launch(bench, "--upload=./data/pairs.jsonl").returncode == 0
    with tarfile.open(bench.repository / "runs/launch/my-run/activedpo_jax.tgz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {"activedpo_jax/data/groups.py", "launch/on_host.sh", "data/pairs.jsonl"} <= names
    assert not {"data/other.jsonl", "runs/old", ".git/config"} & names


def test_an_old_python_gets_a_newer_one_from_uv(bench: Bench) -> None:
    assert launch(bench, OLD_PYTHON="1").returncode == 0
    assert ["-m", "uv", "venv", "--seed", "--python", "3.12", ".venv"] in bench.recorded("python3")
    assert ["-m", "pip", "install", "-e", ".[tpu]"] in bench.recorded("program")
    assert bench.runs() == [program(BUCKET)] * 2


def test_a_preempted_tpu_is_made_anew(bench: Bench) -> None:
    bench.plan("worker0", "preempted")
    bench.plan("worker1", 75)
    assert launch(bench).returncode == 0
    assert verbs(bench) == ["create", "scp", "ssh", "ssh", "delete", *ONCE]
    assert bench.runs() == [program(BUCKET)] * 4


@pytest.mark.parametrize("queue, node", [("SUSPENDED", "READY"), ("ACTIVE", "PREEMPTED"), ("ACTIVE", "TERMINATED")])
def test_a_tpu_that_was_preempted_while_nobody_watched(bench: Bench, queue: str, node: str) -> None:
    (bench.place / "queue").write_text(f"{queue}\n")
    (bench.place / "node").write_text(f"{node}\n")
    (bench.place / "worker0").mkdir()
    assert launch(bench).returncode == 0
    assert verbs(bench) == ["delete", *ONCE]


def test_exit_code_75_starts_the_run_again_on_the_same_tpu(bench: Bench) -> None:
    bench.plan("worker1", 75)
    assert launch(bench).returncode == 0
    assert verbs(bench) == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    assert len(bench.runs()) == 4


@pytest.mark.parametrize("codes, ends", [((75, 2), 2), ((2, 1), 2), ((75, 1), 1), ((0, 1), 1), ((137, 75), 137)])
def test_no_restart_where_a_host_forbids_it(bench: Bench, codes: tuple[int, int], ends: int) -> None:
    for worker, code in enumerate(codes):
        bench.plan(f"worker{worker}", code)
    done = launch(bench)
    assert done.returncode == ends
    assert verbs(bench) == ONCE[:-1] and len(bench.runs()) == 2
    assert "queued-resources delete my-run" in done.stderr and "is billed" in done.stderr


def test_restarts_are_bounded(bench: Bench) -> None:
    bench.plan("worker0", *[75] * 9)
    done = launch(bench, "--max_restarts=2")
    assert done.returncode == 75 and "the same command goes on" in done.stderr
    assert len(bench.runs()) == 2 * 3


def test_a_set_up_whose_connection_broke_is_done_again(bench: Bench) -> None:
    (bench.place / "lost").write_text("255\n")
    assert launch(bench).returncode == 0
    assert verbs(bench) == ["create", "scp", "ssh", "scp", "ssh", "ssh", "delete"]
    assert bench.runs() == [program(BUCKET)] * 2


def test_a_lost_connection_neither_ends_the_run_nor_starts_it_twice(bench: Bench) -> None:
    (bench.place / "lost").write_text("0\n255\n")  # that of the set-up was well
    bench.plan("worker0", 0, 9)
    bench.plan("worker1", 0, 9)
    # The hosts said that they had ended; then their connection broke, and gcloud failed.
    assert launch(bench).returncode == 0
    assert verbs(bench) == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    assert bench.runs() == [program(BUCKET)] * 2


def test_gcloud_without_a_network_is_asked_again(bench: Bench) -> None:
    (bench.place / "offline").touch()
    assert launch(bench).returncode == 0
    assert verbs(bench) == ONCE


def test_a_request_that_failed_stays_for_people_to_read(bench: Bench) -> None:
    (bench.place / "queue").write_text("FAILED\n")
    done = launch(bench)
    assert done.returncode == 1 and "state: FAILED" in done.stderr and verbs(bench) == ["describe"]


def test_kept_on_request(bench: Bench) -> None:
    done = launch(bench, "--keep")
    assert done.returncode == 0 and verbs(bench) == ONCE[:-1] and "is billed" in done.stderr


def test_secrets_reach_the_program_and_no_command_line(bench: Bench) -> None:
    (bench.repository / "my env").write_text("# a token\nSECRET=hush $HOME 'x'\n\nOTHER=b")
    printed = bench.launch("tpu_pod.sh", "--dry_run", *TPU, "--env_file=my env", CONFIG, BUCKET)
    done = launch(bench, "--env_file=my env")
    assert done.returncode == 0
    assert (bench.place / "secrets").read_text() == "hush $HOME 'x'\n" * 2
    assert "hush" not in printed.stdout + done.stdout + done.stderr + (bench.place / "record").read_text()


# -- a host: launch/on_host.sh


@pytest.fixture
def host(bench: Bench) -> Bench:
    folder = bench.repository / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(bench.place / "program")
    return bench


RUN = ("launch/on_host.sh", "run")
COMMAND = (".venv/bin/python", "-m", "activedpo_jax.main")


def test_a_host_goes_on_without_its_connection_and_is_found_again(host: Bench) -> None:
    host.plan("home", "hold")
    command = ["bash", *RUN, "A", *COMMAND, *AWKWARD]
    first = subprocess.Popen(command, cwd=host.repository, env=host.environment, start_new_session=True)
    wait_for(host.place / "waiting")
    first.send_signal(signal.SIGKILL)  # as if the connection broke
    first.wait()
    other = host.shell(["bash", *RUN, "B", *COMMAND, "another"])
    assert other.returncode == 2 and "another command is running here" in other.stderr
    # A new attempt of the same command attaches, too.
    again = subprocess.Popen(
        [*command[:3], "B", *command[4:]], cwd=host.repository, env=host.environment, stdout=subprocess.PIPE, text=True
    )
    assert again.stdout is not None and again.stdout.readline() == "round 1 of home\n"
    (host.place / "release").touch()
    said, _ = again.communicate(timeout=30)
    assert again.returncode == 0 and "ended with exit code 0" in said
    assert [call[2:] for call in host.runs()] == [list(AWKWARD)]


def test_a_host_starts_a_command_once_an_attempt(host: Bench) -> None:
    host.plan("home", 75, 0)
    codes = [host.shell(["bash", *RUN, attempt, *COMMAND]).returncode for attempt in ("A", "A", "B", "B")]
    assert codes == [75, 75, 0, 0] and len(host.runs()) == 2


def test_a_host_whose_command_was_killed_with_all_of_its_keepers_starts_again(host: Bench) -> None:
    host.plan("home", "hold")
    command = ["bash", *RUN, "A", *COMMAND]
    running = subprocess.Popen(command, cwd=host.repository, env=host.environment, stdout=subprocess.PIPE, text=True)
    wait_for(host.place / "waiting")
    keeper = int((host.place / "my repository.launch" / "pid").read_text())
    assert keeper > 1 and os.getpgid(keeper) == keeper != os.getpgid(0)
    os.killpg(keeper, signal.SIGKILL)  # keeper and program
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 75 and "ended with exit code 75" in said
