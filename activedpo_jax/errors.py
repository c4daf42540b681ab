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
    disk that is full or cannot be written; 75 (EX_TEMPFAIL of sysexits.h), interrupted, after which the same command
    resumes; 141, without a line, a pipe that nobody reads any more.
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
        found = _in_one_line(error)
        if found is None:
            raise
        _print(found[0])
        if found[1] != _RESUMABLE:
            _leave()
        sys.exit(found[1])


def _leave() -> None:
    """Several processes part only when all of them are done, with the same result or the same error."""
    from activedpo_jax import hosts  # not at the top, see there

    hosts.leave()


def _in_one_line(error: Exception) -> tuple[str, int] | None:
    """What to print of an error, and the exit code; None: it is a defect of the program, which needs the traceback."""
    import jax  # not at the top, see there

    if jax.distributed.is_initialized() and _LOST.match(str(error)):
        return _ABANDONED.format(reason=" ".join(str(error).split())[:200]), _RESUMABLE
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


def _fail_on_the_spot(error: object) -> NoReturn:
    """As `fail`, with code 1; a process that is the command's own ends without what runs at the end of a process.

    On a full disk the libraries' threads and exit handlers fail, too, and print tracebacks.
    """
    _print(error)
    if signal.getsignal(signal.SIGTERM) is _end:
        flush()
        os._exit(1)
    sys.exit(1)


def _print(error: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")
