"""A repository with launch/ in it, and stubs of every program that the launchers call.

Each stub records its arguments.  Those of gcloud, sbatch and srun also do what the real ones do with a command: hand it
to a shell on each "worker" (a folder that is its home), and end as the real ones end.  Nothing leaves the machine.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
LAUNCHERS = ("one_machine.sh", "tpu_pod.sh", "gke.sh", "slurm.sh")

# Spaces, both quotes, what a shell expands, an empty word: all have to reach the program unchanged.
AWKWARD = (
    "--config.data.buckets=(64,128)",
    "--config.data.train=my data/pairs $HOME `id` $(id).jsonl",
    """--config.data.template_kwargs={"thinking": "it's * ~ ? ! # & ; | < >"}""",
    "--config.oracle.function=a  b",
    "$$HOME \\n",
    "",
)

RECORD = r"""#!/usr/bin/env bash
set -euo pipefail
printf '%s\0' "$(basename "$0")" "$@" "<end>" >>"$BENCH/record"
take() { # the next line of a plan, or nothing
    [ -s "$1" ] || return 0
    head -n 1 "$1"
    sed -i 1d "$1"
}
"""

# The program: its codes come from $PLAN or, on a worker, from plan/WORKER, one line a start; 0 after the last.
PROGRAM = (
    RECORD.replace('$(basename "$0")', "program")
    + r"""
[ "${2:-}" = activedpo_jax.main ] || exit 0 # pip
plan=$BENCH/plan/$(basename "$HOME")
[ -z "${SECRET:-}" ] || echo "$SECRET" >>"$BENCH/secrets"
echo "round 1 of $(basename "$HOME")"
code=$(take "$plan")
case $code in
    wait) # for a signal
        trap 'exit 75' TERM
        touch "$BENCH/waiting"
        for _ in $(seq 600); do sleep 0.05; done
        ;;
    hold) # until a file is there
        touch "$BENCH/waiting"
        for _ in $(seq 600); do [ -e "$BENCH/release" ] && exit 0; sleep 0.05; done
        exit 9
        ;;
    preempted)
        echo SUSPENDED >"$BENCH/queue"
        exit 75
        ;;
esac
exit "${code:-0}"
"""
)

PYTHON3 = (
    RECORD
    + r"""
case "$*" in
    "-c "*) exit "${OLD_PYTHON:-0}" ;;
    *"venv "*)
        folder=${*: -1}
        mkdir -p "$folder/bin"
        cp "$BENCH/program" "$folder/bin/python"
        cp "$BENCH/program" "$folder/bin/pip"
        ;;
esac
"""
)

# The file `queue` is the queued resource's state, `node` the TPU's; a request is granted at the second look.
GCLOUD = (
    RECORD
    + r"""
workers="worker0 worker1"
shift 2 # compute tpus
case "$1 $2" in
    "queued-resources list")
        [ ! -e "$BENCH/offline" ] || { rm "$BENCH/offline"; echo "no network" >&2; exit 1; }
        [ -e "$BENCH/queue" ] || exit 0
        cat "$BENCH/queue"
        if [ "$(cat "$BENCH/queue")" = WAITING_FOR_RESOURCES ]; then echo ACTIVE >"$BENCH/queue"; fi
        ;;
    "queued-resources create")
        [ ! -e "$BENCH/queue" ] || { echo ALREADY_EXISTS >&2; exit 1; }
        echo WAITING_FOR_RESOURCES >"$BENCH/queue"
        echo READY >"$BENCH/node"
        for worker in $workers; do mkdir -p "$BENCH/$worker"; done
        ;;
    "queued-resources delete") rm -r "$BENCH"/worker? "$BENCH/queue" "$BENCH/node" ;;
    "queued-resources describe") echo "state: FAILED" ;;
    "tpu-vm list") cat "$BENCH/node" ;;
    "tpu-vm scp") for worker in $workers; do cp "$3" "$BENCH/$worker/${4#*:}"; done ;;
    "tpu-vm ssh")
        for argument in "$@"; do case $argument in --command=*) command=${argument#*=} ;; esac; done
        codes=""
        for worker in $workers; do
            (cd "$BENCH/$worker" && HOME=$BENCH/$worker exec bash -c "$command") &
            codes="$codes $!"
        done
        status=0
        for job in $codes; do
            code=0
            wait "$job" || code=$?
            [ "$status" != 0 ] || status=$code
        done
        lost=$(take "$BENCH/lost")
        exit "${lost:-$status}" # as gcloud: the first code that is not 0; 255 if a connection broke
        ;;
    *) exit 2 ;;
esac
"""
)

# Like Slurm, it runs a copy of the script, in the folder of --chdir.
SBATCH = (
    RECORD
    + r"""
for argument in "$@"; do case $argument in --chdir=*) cd "${argument#*=}" ;; esac; done
while [ "${1#--}" != "$1" ]; do shift; done
cp "$1" "$BENCH/slurm_script"
shift
SLURM_JOB_ID=7 bash "$BENCH/slurm_script" "$@" &
echo "$!" >"$BENCH/script_pid"
code=0
wait "$!" || code=$?
exit "$code"
"""
)

SRUN = (
    RECORD
    + r"""
shift # --kill-on-bad-exit=0
highest=0
for task in 0 1; do
    code=0
    HOME=$BENCH/task$task "$@" || code=$?
    if [ "$code" != 0 ]; then echo "srun: error: node$task: task $task: Exited with exit code $code" >&2; fi
    if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
if [ -e "$BENCH/cancelled" ]; then kill -TERM "$(cat "$BENCH/script_pid")"; fi
exit "$highest"
"""
)

STUBS = dict.fromkeys(("xpk", "docker", "scontrol"), RECORD)
STUBS |= {"python3": PYTHON3, "python": PROGRAM, "gcloud": GCLOUD, "sbatch": SBATCH, "srun": SRUN}


@dataclasses.dataclass(frozen=True)
class Bench:
    """A place for one test; `place` is what the stubs know as $BENCH, `repository` has a space in its name."""

    place: pathlib.Path

    @property
    def repository(self) -> pathlib.Path:
        return self.place / "my repository"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
        return kept | {
            "BENCH": str(self.place),
            "HOME": str(self.place / "home"),
            "PATH": f"{self.place / 'stubs'}:/usr/local/bin:/usr/bin:/bin",
        }

    def launch(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.shell(["bash", f"launch/{words[0]}", *words[1:]], **variables)

    def shell(self, words: list[str], text: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.repository,
            env=self.environment | variables,
            input=text,
            text=True,
            capture_output=True,
            timeout=60,
        )

    def plan(self, who: str, *codes: int | str) -> None:
        """How the program ends, start after start; who: home (one machine), worker0, worker1, task0 or task1."""
        (self.place / "plan" / who).write_text("".join(f"{code}\n" for code in codes))

    def recorded(self, name: str = "") -> list[list[str]]:
        """The arguments of every call so far, or of those of one program without its name."""
        file = self.place / "record"
        text = file.read_text() if file.exists() else ""
        calls = [call.split("\0") for call in text.removesuffix("\0<end>\0").split("\0<end>\0")] if text else []
        return [call[1:] for call in calls if call[0] == name] if name else calls

    def runs(self) -> list[list[str]]:
        """The arguments of every start of the program itself."""
        return [call for call in self.recorded("program") if call[1:2] == ["activedpo_jax.main"]]

    def forget(self) -> None:
        (self.place / "record").unlink(missing_ok=True)


def make(place: pathlib.Path) -> Bench:
    bench = Bench(place)
    for folder in ("stubs", "plan", "home"):
        (place / folder).mkdir()
    for name, text in STUBS.items():
        (place / "stubs" / name).write_text(text)
        (place / "stubs" / name).chmod(0o755)
    (place / "program").write_text(PROGRAM)
    (place / "program").chmod(0o755)
    shutil.copytree(ROOT / "launch", bench.repository / "launch")
    for name in ("activedpo_jax/data/groups.py", "data/pairs.jsonl", "data/other.jsonl", ".git/config", "runs/old"):
        (bench.repository / name).parent.mkdir(parents=True, exist_ok=True)
        (bench.repository / name).write_text(name)
    return bench
