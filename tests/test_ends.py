"""How a command ends: signals, pipes that nobody reads, disks and memory that do not suffice; each in one line."""

import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from activedpo_jax import compile_only, config, errors, flags, generate, main, sft, tasks
from activedpo_jax.config import OPTIONS
from activedpo_jax.layout import make_mesh
from activedpo_jax.record import checkpoints
from tests.test_resume import OPTIONS as TINY
from tests.test_resume import record
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

SAVING = "interrupted: the work under way is saved at its next step; a second signal ends it at once\n"
ROOT = pathlib.Path(errors.__file__).parents[1]
INTERRUPTED = "error: interrupted; what is in the work directory is whole, and the same command resumes it\n"


# Processes as a user starts them


@pytest.fixture(autouse=True, scope="module")
def interruptible() -> Iterator[None]:
    """Children ignore SIGINT if the tests do, as in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder: pathlib.Path, **settings: Any) -> subprocess.Popen[str]:
    """The command of a tiny run; `settings` of its `Popen`, of which `env` comes on top."""
    options = [f"--config.{name}={value}" for name, value in (TINY | {"rounds": 2}).items()]
    command = [sys.executable, "-m", "activedpo_jax.main", "--config=configs/quickstart.py", f"--workdir={folder}"]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **settings.pop("env", {}),
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, **(pipes | settings))


def end(process: subprocess.Popen[str], code: int) -> str:
    """What the process wrote on stderr until it ended with this exit code."""
    _, written = process.communicate(timeout=300)
    assert process.returncode == code, written
    return written


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Whole(NamedTuple):
    folder: pathlib.Path
    log: str
    refusal: str  # what a second process said, started while this one worked


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that nothing disturbed."""
    place = tmp_path_factory.mktemp("whole")
    folder, log = place / "run", place / "log"
    with open(log, "w") as file:
        first = start(folder, stdout=file, stderr=subprocess.STDOUT)
    wait_for(first, (folder / "config.json").exists)
    refusal = end(start(folder), code=2)
    assert first.poll() is None
    end(first, code=0)
    assert f"process {first.pid} works here" in refusal
    return Whole(folder, log.read_bytes().decode(), refusal)


@pytest.mark.slow
def test_a_second_process_is_refused_in_one_line(whole: Whole) -> None:
    assert whole.refusal.startswith(f"error: {whole.folder}: process ") and whole.refusal.count("\n") == 1


@pytest.mark.slow
def test_a_log_has_no_bars(whole: Whole) -> None:
    assert "round 2/2" in whole.log and "curves.png" in whole.log
    assert "\r" not in whole.log and "\x1b" not in whole.log and "%|" not in whole.log


def catches(number: signal.Signals, pid: int) -> bool:
    """Whether the process has a handler for the signal; Python itself has one for SIGINT alone."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="the moments are seen in Linux's /proc")
def test_signals_end_in_one_line_and_the_same_command_goes_on(whole: Whole, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    moments: list[tuple[signal.Signals, Callable[[int], bool]]] = [
        (signal.SIGTERM, lambda pid: catches(signal.SIGTERM, pid)),  # the imports begin
        (signal.SIGINT, lambda pid: "jaxlib" in pathlib.Path(f"/proc/{pid}/maps").read_text()),
        (signal.SIGTERM, lambda pid: (folder / "inputs" / "seed0.json").exists()),  # the base model is trained
    ]
    for number, ready in moments:
        process = start(folder)
        wait_for(process, functools.partial(ready, process.pid))
        process.send_signal(number)
        assert end(process, code=75) == INTERRUPTED
    # The first round, one program, is waited for and kept.
    process = start(folder)
    wait_for(process, (folder / "checkpoints" / "0").exists)
    process.send_signal(signal.SIGINT)
    assert end(process, code=75) == SAVING + INTERRUPTED
    assert (folder / "partial" / "001" / "choice" / "round" / "000000-000001").exists()
    assert not (folder / "checkpoints" / "1").exists()
    end(start(folder), code=0)
    assert record(folder) == record(whole.folder)


@pytest.mark.slow
def test_a_finished_run_whose_table_nobody_reads(whole: Whole) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(whole.folder, stdout=write)
    os.close(write)
    assert end(process, code=141) == ""


@contextlib.contextmanager
def mounted(folder: pathlib.Path, options: str) -> Iterator[Callable[[str], None]]:
    """A file system in memory; the function changes its options."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "activedpo-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted: {done.stderr.strip()}")

    folder.mkdir()
    mount(options)
    try:
        yield lambda changed: mount(f"remount,{changed}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_file_system_that_is_full_or_read_only(whole: Whole, tmp_path: pathlib.Path) -> None:
    full, closed = tmp_path / "full", tmp_path / "closed"
    with mounted(full, "size=200k") as change, mounted(closed, "ro"):
        processes = start(full / "run"), start(closed / "run")
        resumes = "; once the disk has space and can be written, the same command resumes\n"
        for process, folder, reason in zip(processes, (full, closed), (errno.ENOSPC, errno.EROFS), strict=True):
            line = end(process, code=1)
            assert line.startswith(f"error: {folder}/run") and line.count("\n") == 1
            assert line.endswith(f": {os.strerror(reason)}{resumes}")
        assert (full / "run" / "inputs").exists() and not (full / "run" / "base" / "seed0").exists()
        change("size=10m")
        end(start(full / "run"), code=0)
        assert record(full / "run") == record(whole.folder)


@pytest.mark.slow
def test_files_that_must_not_grow(whole: Whole, tmp_path: pathlib.Path) -> None:
    """Orbax meets the limit in one of its threads, and so would log it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # less than one array of the base model

    line = end(start(tmp_path / "run", preexec_fn=limit), code=1)
    assert line.startswith(f"error: {tmp_path}/run/base/seed0") and line.count("\n") == 1
    assert f": {os.strerror(errno.EFBIG)}; once the disk" in line


def test_platforms_that_are_not_there_get_one_line(tmp_path: pathlib.Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    processes = {
        platforms: start(tmp_path / "run", env=environment | {"JAX_PLATFORMS": platforms})
        for platforms in ("cuda", "nonsense")
    }
    for platforms, process in processes.items():
        written = end(process, code=2)
        last = written.splitlines()[-1]
        assert last.startswith(f"error: JAX_PLATFORMS='{platforms}': JAX found no device")
        assert "unset JAX_PLATFORMS" in last and written.count("error:") == 1 and "Traceback" not in written
    assert not (tmp_path / "run").exists()


# Ends on the spot


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", flags.COMMANDS)
def test_a_signal_at_the_first_of_the_long_imports(command: str, number: signal.Signals) -> None:
    script = (
        "import os, runpy, sys, time\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] not in {*sys.stdlib_module_names, 'activedpo_jax'}:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"runpy.run_module('activedpo_jax.{command}', run_name='__main__', alter_sys=True)\n"
    )
    done = run_script(script)
    assert (done.returncode, done.stderr, done.stdout) == (75, INTERRUPTED, "")


def test_a_signal_that_meets_the_garbage_collector() -> None:
    """An exception would be printed there, and dropped."""
    script = (
        "import gc, os, signal\n"
        "from activedpo_jax import errors\n"
        "errors.end_at_signals()\n"
        "print('before')\n"
        "gc.callbacks.append(lambda *arguments: os.kill(os.getpid(), signal.SIGINT))\n"
        "with errors.clean_errors(): gc.collect(); print('after')\n"
    )
    done = run_script(script)
    assert (done.returncode, done.stderr, done.stdout) == (75, INTERRUPTED, "before\n")


def test_a_full_disk_ends_a_command_before_its_exit_handlers_meet_it() -> None:
    script = (
        "import atexit, errno\n"
        "from activedpo_jax import errors\n"
        "errors.end_at_signals()\n"
        "atexit.register(lambda: 1 / 0)\n"
        "print('before')\n"
        "with errors.clean_errors(): raise OSError(errno.ENOSPC, 'full', 'x')\n"
    )
    done = run_script(script)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "before\n", 1)
    assert done.stderr.startswith("error: x: No space left on device; ")


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (
            "os.kill(os.getpid(), 15); assert errors.signalled(); print('saved', flush=True)",
            (SAVING + INTERRUPTED, "saved\n"),
        ),
        ("os.kill(os.getpid(), 15); os.kill(os.getpid(), 2); print('not reached')", (SAVING + INTERRUPTED, "")),
    ],
    ids=["one", "two"],
)
def test_a_signal_waits_for_work_to_be_saved_and_a_second_does_not(work: str, expected: tuple[str, str]) -> None:
    code = f"""
import os
from activedpo_jax import errors
errors.end_at_signals()
with errors.signals_wait():
    {work}
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (75, *expected)


def test_an_ignored_signal_stays_ignored() -> None:
    script = (
        "import os, signal\n"
        "from activedpo_jax import errors\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "errors.end_at_signals()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('alive')\n"
    )
    assert run_script(script).stdout == "alive\n"


def run_script(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


# Pipes


@pytest.mark.parametrize(
    "work",
    [
        "flags.read_config(['main', '--help'], ())",
        "flags.read_config(['main', '--config=configs/quickstart.py', '--workdir=x'], ['activedpo', 'random'])\n"
        "print('y')",
        "with errors.clean_errors(): print('y')",
        "with errors.clean_errors(): print('y' * 100_000)",
    ],
)
def test_a_reader_that_leaves_is_no_error(work: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", f"from activedpo_jax import errors, flags\n{work}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes: dict[str, Any] = {"stdout": write, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=environment, **pipes)
    os.close(write)
    assert done.stderr == "" and done.returncode == (0 if "quickstart" in work else 141)


def test_three_lines_of_help() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m activedpo_jax.main --help | head -3",
        shell=True, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == "" and len(done.stdout.splitlines()) == 3 and "--workdir DIR" in done.stdout


def test_output_on_a_full_disk_gets_one_line() -> None:
    command = [sys.executable, "-c", "from activedpo_jax import flags\nflags.read_config(['main', '--help'], ())"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and os.strerror(errno.ENOSPC) in done.stderr


@contextlib.contextmanager
def ends_unread() -> Iterator[None]:
    """A command's work, whose lines go into a pipe that nobody reads, each at once."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stdout:
        with contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as raised:
            yield
        assert raised.value.code == 141


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_the_last_line_of_a_command_is_not_read(
    command: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tiny_llama(tmp_path / "base", vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"What is {i}?", "chosen": "It is blue", "rejected": "Not today"} for i in range(2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.py").write_text(
        "from activedpo_jax.config import default\n\n\n"
        "def get_config():\n"
        "    config = default()\n"
        f"    config.model.path = {str(tmp_path / 'base')!r}\n"
        f"    config.generation.prompts = config.sft.data = {str(tmp_path / 'data.jsonl')!r}\n"
        "    config.generation.max_new_tokens = 4\n"
        "    config.data.buckets = ((32, 16),)\n"
        "    return config\n"
    )
    monkeypatch.setattr(sft, "is_done", lambda options, folder: True)
    begin = {"sft": sft.main, "generate": generate.main}[command]
    with ends_unread():
        begin([command, f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"])


def test_the_figures_of_compiling_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_only, "compile_for", lambda options, topology, folder: print("bytes"))
    with ends_unread():
        main.main(["main", "--config=configs/quickstart.py", "--compile_only=v5e:4x4"])


# Errors and their lines


def ending(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """The exit code and the line of a command whose work raises this."""
    with pytest.raises(SystemExit) as raised, errors.clean_errors():
        raise error
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return raised.value.code, line


def test_memory_that_does_not_suffice_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MemoryError) as of_numpy:
        np.zeros(2**58)
    with pytest.raises(jax.errors.JaxRuntimeError) as of_jax:
        jax.block_until_ready(jax.numpy.zeros(2**46, np.int8))
    for error, reason in (
        (of_numpy.value, "Unable to allocate 2.00 EiB"),
        (of_jax.value, "Out of memory allocating 70368744177664 bytes"),
        (MemoryError(), "the host has no more"),
    ):
        code, line = ending(error, capsys)
        assert code == 1 and f"out of memory ({reason}" in line
        for name in ("features.groups_per_chunk", "dpo.pairs_per_chunk", "data.buckets", "lora.rank", "model.remat"):
            assert name in line and name in OPTIONS
    with pytest.raises(jax.errors.JaxRuntimeError), errors.clean_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")


def chained(error: Exception, behind: Exception, link: str) -> Exception:
    """`error`, raised while `behind` was handled, or `from` it."""
    setattr(error, link, behind)
    return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_full_disk_behind_an_error_gets_one_line(number: int, link: str, capsys: pytest.CaptureFixture[str]) -> None:
    disk = OSError(number, os.strerror(number), "/runs/checkpoints/1")
    error = chained(RuntimeError("save failed"), chained(ValueError("commit failed\nat length"), disk, link), link)
    for each in (error, disk):
        code, line = ending(each, capsys)
        assert code == 1 and f"/runs/checkpoints/1: {os.strerror(number)}" in line
        assert "the same command resumes" in line


def test_a_full_disk_that_tensorstore_met(capsys: pytest.CaptureFixture[str]) -> None:
    """The text is what version 0.1.80 raised on a tmpfs of 1 MB."""
    text = (
        'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database at local file "/runs/d/": Failed writing: '
        '"/runs/d/0d20": Failed to write 926742 bytes to file 14: No space left on device [os_error_code="28"]'
    )
    code, line = ending(ValueError(text), capsys)
    assert code == 1 and "/runs/d/: No space left on device" in line


def test_a_lost_process_is_known_behind_other_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Orbax raises it from a save in the background."""
    barrier = jax.errors.JaxRuntimeError("UNAVAILABLE: Task /job:jax_worker/replica:0/task:1 heartbeat timeout")
    error = chained(TimeoutError("Timed out while waiting for async_write_complete barrier."), barrier, "__cause__")
    assert ending(error, capsys)[0] == 1
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    code, line = ending(error, capsys)
    assert code == 75 and line.startswith("error: another process of this run has ended (UNAVAILABLE: Task")


def test_other_errors_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "x.jsonl")
    assert ending(missing, capsys) == (1, "error: x.jsonl: No such file or directory\n")
    assert ending(chained(ValueError("no data"), missing, "__cause__"), capsys) == (2, "error: no data\n")
    assert ending(ValueError("no data\nat all"), capsys) == (2, "error: no data at all\n")
    assert ending(FloatingPointError("not finite"), capsys) == (1, "error: not finite\n")
    assert ending(KeyboardInterrupt(), capsys) == (75, INTERRUPTED)
    with pytest.raises(KeyError), errors.clean_errors():
        raise chained(KeyError("a defect"), missing, "__cause__")


def test_what_orbax_logs_is_heard_unless_it_is_raised() -> None:
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    def work(name: str) -> None:
        with checkpoints.each_error_once():
            absl_logging.warning("%s begins", name)
            try:
                raise OSError(name)
            except OSError:
                absl_logging.exception("%s failed", name)
                if name == "saving":
                    raise

    def failing(name: str) -> None:
        try:
            raise OSError(name)
        except OSError:
            absl_logging.exception("%s failed", name)

    listener, logger = Listener(), absl_logging.get_absl_logger()
    logger.addHandler(listener)
    try:
        with pytest.raises(OSError, match="saving"):
            work("saving")
        work("tidying")
        absl_logging.error("later")
        # The next wait raises what a save in the background could not do: Orbax logs it in a thread of this name.
        for thread in ("async_save", "another"):
            logging_thread = threading.Thread(name=thread, target=failing, args=(thread,))
            logging_thread.start()
            logging_thread.join()
    finally:
        logger.removeHandler(listener)
    assert heard == ["saving begins", "tidying begins", "tidying failed", "later", "another failed"]


def test_fewer_examples_than_a_batch_are_refused() -> None:
    """The base model is trained on one device, whatever the mesh."""
    options = config.default()
    options.data.train = "synthetic"
    options.scratch.batch_size, options.scratch.examples = 61, 60
    mesh = make_mesh(options.mesh)
    expected = r"config\.scratch\.examples=60 is less than a batch, config\.scratch\.batch_size=61"
    with pytest.raises(ValueError, match=expected):
        tasks.load(options, 0, mesh, None)
    options.scratch.examples = 61
    assert tasks.load(options, 0, mesh, None).base_model == tasks.SYNTHETIC
