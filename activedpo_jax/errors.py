"""How a command ends: one line for what a user can mend, a traceback for a defect, and an exit code for scripts.

Imports the standard library alone, so that a command can call `end_at_signals` before the imports that take seconds.
"""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class UsageError(ValueError):
    """The command line or the config file is wrong; the message is one line for the person who typed it."""


class StoreError(OSError):
    """An object store, or a server that gives labels, cannot be reached, refuses, or fails."""

    @classmethod
    def passing(cls, path: str, reason: str) -> "StoreError":
        """One that may be over when the command is given again."""
        return cls(errno.EAGAIN, reason, path)

    @classmethod
    def lasting(cls, path: str, reason: str) -> "StoreError":
        """One that somebody has to mend first."""
        return cls(errno.EIO, reason, path)


_RESUMABLE = 75
_PIPE = 128 + signal.SIGPIPE

_INTERRUPTED = "interrupted; what is in the work directory is whole, and the same command resumes it"
_SAVING = "interrupted: the work under way is saved at its next step; a second signal ends it at once\n"
_LESS_MEMORY = (
    "lower features.groups_per_chunk, evaluation.pairs_per_chunk, dpo.pairs_per_chunk or sft.examples_per_chunk, "
    "generation.prompts_per_chunk, the largest of data.buckets, or lora.rank; or set model.remat=full or "
    "model.quantisation=int8"
)
_ABANDONED = (
    "another process of this run has ended ({reason}); what is in the work directory is whole, and the same command on "
    "every host resumes it"
)
# What the collectives of a run that has lost a process raise; an error of ours does not begin so.
_LOST = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def end_at_signals() -> None:
    """From here on SIGINT and SIGTERM end the process with one line and exit code 75.

    The process ends on the spot, as if it were killed, which the work directory survives.  An exception would not
    always end it: Python prints one that meets a destructor or a callback of the garbage collector, JAX's for
    instance, with its traceback, and goes on.  A signal that the parent process has set to be ignored stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


class _Signals:
    """Whether a signal has to wait for work to be saved, and whether one has come."""

    waits = False
    came = False


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM wait for somebody who looks at `signalled`, saves, and calls `end`."""
    before, _Signals.waits = _Signals.waits, True
    try:
        yield
    finally:
        _Signals.waits = before
    if _Signals.came and not before:
        end()


def signalled() -> bool:
    """Whether a signal waits."""
    return _Signals.came


def end() -> NoReturn:
    """Ends the process as an interrupted one, on the spot."""
    with contextlib.suppress(RuntimeError, OSError):  # RuntimeError: a signal came while something was printed
        sys.stdout.flush()
    line = f"error: {_INTERRUPTED}\n"
    with contextlib.suppress(OSError):
        os.write(2, (f"\n{line}" if os.isatty(2) else line).encode())  # a terminal may show a progress bar
    os._exit(_RESUMABLE)


def _end(number: int, frame: FrameType | None) -> None:
    if _Signals.waits and not _Signals.came:
        _Signals.came = True
        with contextlib.suppress(OSError):
            os.write(2, _SAVING.encode())
        return
    end()


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Around a command's work: what a user can mend ends in one line, not in a traceback.

    Exit codes: 2, a mistake in options, files or data; 1, numbers that are not finite, memory that does not suffice, a
    disk that is full or cannot be written, an object store that refuses (no such bucket, no permission); 75
    (EX_TEMPFAIL of sysexits.h), interrupted, or an object store or a server that gives labels cannot be reached or
    fails (5xx, time-outs, too many requests) for longer than its clients try, after which the same command resumes;
    141, without a line, a pipe that nobody reads any more.
    """
    try:
        yield
        sys.stdout.flush()
        _leave()
    except BrokenPipeError:
        flush()
        sys.exit(_PIPE)
    except KeyboardInterrupt:
        fail(_INTERRUPTED, code=_RESUMABLE)
    except Exception as error:
        if disk := _disk_error(error):
            _fail_on_the_spot(f"{disk}; once the disk has space and can be written, the same command resumes")
        if store := _store_error_behind(error):
            passing = store.errno == errno.EAGAIN
            then = "once it answers" if passing else "once that is mended"
            line = f"{store.filename}: {store.strerror}; what is there is whole, and {then} the same command resumes"
            _fail_on_the_spot(line, _RESUMABLE if passing else 1)
        if lost := _lost_process(error):
            _fail_on_the_spot(_ABANDONED.format(reason=lost), _RESUMABLE)
        found = _in_one_line(error)
        if found is None:
            raise
        _print(found[0])
        _leave()
        sys.exit(found[1])


def of_a_run(error: Exception) -> str | None:
    """What to record of an error that ends one of several runs; None: a disk, an object store or another process is
    behind it, which no run can do without."""
    if _disk_error(error) or _store_error_behind(error) or _lost_process(error):
        return None
    found = _in_one_line(error)
    return found[0] if found else f"{type(error).__name__}: {error}"


def _leave() -> None:
    """Several processes part only when all of them are done, with the same result or the same error."""
    from activedpo_jax import hosts, remote  # not at the top, see there

    remote.release_locks()
    hosts.leave()


def _lost_process(error: BaseException | None) -> str | None:
    """What says that another process has ended, in an error or those that led to it; None: nothing does."""
    import jax  # not at the top, see there

    while error is not None and jax.distributed.is_initialized():
        if _LOST.match(str(error)):
            return " ".join(str(error).split())[:200]
        error = error.__cause__ or error.__context__
    return None


def _in_one_line(error: Exception) -> tuple[str, int] | None:
    """What to print of an error, and the exit code; None: it is a defect of the program, which needs the traceback."""
    import jax  # not at the top, see there

    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    ):
        reason = (str(error).splitlines() or [""])[0].removeprefix("RESOURCE_EXHAUSTED: ") or "the host has no more"
        return f"out of memory ({reason}): {_LESS_MEMORY}", 1
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, FloatingPointError):
        return str(error), 1
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or error}", 1
    return None


def _disk_error(error: BaseException | None) -> str | None:
    """File and reason, where a disk that is full or cannot be written is behind an error or those that led to it.

    TensorStore, which writes checkpoints, has the reason in the text of a ValueError alone.
    """
    while error is not None:
        for number in _DISK:
            reason, text = os.strerror(number), str(error)
            if isinstance(error, OSError) and error.errno == number:
                return f"{error.filename or 'file'}: {reason}"
            if isinstance(error, ValueError) and reason in text:
                file = re.search(r'"(/[^"]*)"', text)
                return f"{file[1] if file else 'file'}: {reason}"
        error = error.__cause__ or error.__context__
    return None


# Packages whose exceptions say what an object store or the way to it said; and how TensorStore has it, which writes
# checkpoints and raises a ValueError.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")
_TENSORSTORE = re.compile(r"[A-Z_]+: .*?\b(gs://[^\s\"\]]+)")
# What it says of a checkpoint that is damaged, and of which the store has answered all that there is.
_DAMAGED = re.compile(
    r"(OUT_OF_RANGE|DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT): (?!.*HTTP response code)"
)
_PASSING = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|time(d )?.?out|[Cc]onnect")
_STATUS = re.compile(r"(?:HTTP response code|status(?: code)?|code): ?(\d{3})|, (\d{3})$")


def store_error(error: BaseException, path: str) -> StoreError | None:
    """What an exception of an object store's client means for the object or folder `path`; None: it is another kind."""
    if isinstance(error, StoreError):
        return error
    text = " ".join(str(error).split())
    reason = f"the object store fails ({type(error).__name__}: {text[:200]})" if text else type(error).__name__
    status = getattr(error, "code", None) or getattr(error, "status", None) or _status_of_s3(error)
    if not isinstance(status, int) and (found := _STATUS.search(text)):
        status = int(found[1] or found[2])
    from_client = type(error).__module__.partition(".")[0] in _CLIENTS
    if isinstance(status, int) and (from_client or isinstance(error, ValueError | RuntimeError | OSError)):
        passing = status in (408, 409, 429) or status >= 500 or isinstance(error, TimeoutError)
    elif from_client or isinstance(error, OSError):  # TimeoutError and ConnectionError are OSErrors, too
        passing = isinstance(error, ConnectionError | TimeoutError) or bool(_PASSING.search(f"{type(error)} {text}"))
    elif isinstance(error, ValueError | RuntimeError):
        passing = bool(_PASSING.search(text))
    else:
        return None
    return StoreError.passing(path, reason) if passing else StoreError.lasting(path, reason)


def _status_of_s3(error: BaseException) -> int | None:
    """What S3 answered; s3fs raises an OSError for botocore's, which knows it."""
    for one in (error, error.__cause__):
        if isinstance(answer := getattr(one, "response", None), dict):
            return int(answer["ResponseMetadata"]["HTTPStatusCode"])
    return None


def _store_error_behind(error: BaseException) -> StoreError | None:
    """The object store's error that ended a command; None: it was another."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StoreError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return store_error_of_checkpoints(error)


def store_error_of_checkpoints(error: BaseException) -> StoreError | None:
    """What an exception of Orbax says of an object store; None: nothing."""
    text = " ".join(str(error).split())
    found = None if _DAMAGED.match(text) else _TENSORSTORE.match(text)
    if found or type(error).__module__.partition(".")[0] in _CLIENTS:
        return store_error(error, found[1] if found else "--workdir")
    return None


def flush() -> None:
    """Writes out what was printed; what cannot be written is dropped, or the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(error: object, code: int = 2) -> NoReturn:
    """Prints the error without a traceback, and exits; code 2 is that of every mistake in usage."""
    _print(error)
    sys.exit(code)


def _fail_on_the_spot(error: object, code: int = 1) -> NoReturn:
    """As `fail`; a process that is the command's own ends without what runs at the end of a process.

    On a full disk, or without an object store or the other processes, the libraries' threads and exit handlers fail,
    too, and print tracebacks, or try again for minutes.
    """
    _print(error)
    if signal.getsignal(signal.SIGTERM) is _end:
        flush()
        os._exit(code)
    sys.exit(code)


def _print(error: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
