"""Whether a command is one of several processes, and a parent that says how it ended.

Imports the standard library alone, so that a command can call `guard` before the imports that take seconds.
"""

import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

FLAGS = ("coordinator", "num_processes", "process_id")

_RESUMABLE = 75  # as in `errors`
_ABANDONED = (
    "error: another process of this run has ended, or does not answer; what is in the work directory is whole, and the "
    "same command on every host resumes it\n"
)
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Address(NamedTuple):
    """How the processes find each other; None: as the environment says."""

    coordinator: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None


def detected(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """What says that there are several processes; None: nothing does.

    Args:
      arguments: of the command; `--coordinator=HOST:PORT` counts more than the environment.
    """
    if any(argument.lstrip("-").partition("=")[0] == FLAGS[0] for argument in arguments if argument.startswith("-")):
        return f"--{FLAGS[0]}"
    if any("," in environment.get(name, "") for name in _TPU_HOSTS) or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "GKE" if "KUBERNETES_SERVICE_HOST" in environment else "Cloud TPU"
    # A step of srun: a batch script has the job's variables, too, and is alone.
    if all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if environment.get("JAX_PLATFORMS", "tpu") == "tpu" and _has_tpu():
        return "Cloud TPU"  # of one host or of several: the machine's metadata know
    return None


def _has_tpu() -> bool:
    """Whether there is what a TPU's driver shows, and the library that would use it."""
    shown = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    return shown and importlib.util.find_spec("libtpu") is not None


def guard() -> None:
    """Runs the rest of this process in a child if it is one of several.

    JAX aborts a process whose run has lost another one, with a native trace and a signal's exit code.  The parent turns
    that into one line and exit code 75, on which a launcher starts the command again.
    """
    if detected(sys.argv[1:], os.environ) is None or not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives its parent
        return

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGTERM, forward)
    # A terminal sends ^C to the child itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN if os.isatty(0) else forward)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGABRT:
        os.write(2, _ABANDONED.encode())
        code = _RESUMABLE
    os._exit(128 - code if code < 0 else code)
