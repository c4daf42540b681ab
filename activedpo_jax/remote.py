"""Work directories in an object store: `gs://bucket/path` or `s3://bucket/path`.

An object is written whole or not at all, so that writing one needs no rename.  Nothing can be appended to: who appends
writes the whole object anew, which is safe with one writer, and the lock sees to that.

The lock of a work directory is the object `.lock/N` with the highest N.  Making an object that must not exist yet is
atomic, so that of two processes that want `.lock/N+1` exactly one gets it.  The holder writes its object again every
`RENEWAL_SECONDS`; whoever finds it watches it, and takes over with `.lock/N+1` when it is released or has not changed
for `STALE_SECONDS` by the watcher's own clock, or at once when its process was one of this machine and is gone.
Before it writes an object, a holder that has not been able to renew its lock for half that time asks whether somebody
has taken over, and ends if so.  Not excluded: that a process which hung for longer than `STALE_SECONDS` goes on with
the one write that it was in, a checkpoint for instance.
"""

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from activedpo_jax.errors import StoreError, UsageError, store_error

SCHEMES = ("gs", "s3")
RENEWAL_SECONDS = 15
STALE_SECONDS = 60


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in an object store."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def in_store(path: object) -> "RemotePath | None":
    """The path itself if it is in an object store."""
    return path if isinstance(path, RemotePath) else None


class Status(NamedTuple):
    """Of an object, as `os.stat_result` names it."""

    st_size: int  # bytes
    st_mtime_ns: int


class RemotePath(pathlib.PurePosixPath):
    """A path in an object store, with those methods of `pathlib.Path` that a work directory needs.

    A folder is what objects have in the beginnings of their names: it need not be made, and is gone with the last of
    them.  Whatever the store answers, nothing is taken for absent unless the store says so.

    Raises (all methods that ask the store):
      StoreError: it cannot be reached, refuses, or fails.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        return str(self)

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "directory"

    def is_file(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "file"

    def stat(self) -> Status:
        """Raises FileNotFoundError if there is no such object."""
        with _asking(self) as store:
            info, modified = store.info(str(self)), store.modified(str(self))
        return Status(int(info["size"]), round(modified.timestamp() * 1e6) * 1000)

    def iterdir(self) -> Iterator["RemotePath"]:
        """Raises FileNotFoundError if there is nothing."""
        with _asking(self) as store:
            names = store.ls(str(self), detail=False)
        own = str(self).partition("://")[2]
        found = (name.partition("://")[2] if "://" in name else name for name in names)
        return iter([self / name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != own])

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there once something is in it."""

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """Opens an object for reading, all of which is read at once."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: objects are written whole; expected the mode r or rb, got {mode}")
        file = io.BytesIO(self.read_bytes())
        return file if mode == "rb" else io.TextIOWrapper(file, encoding or "utf-8", newline=newline)

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        with _asking(self) as store:
            return bytes(store.cat_file(str(self)))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Writes an object, whole or not at all."""
        with _writing(self) as store:
            store.pipe_file(str(self), data)

    def create(self, data: bytes) -> None:
        """Writes an object; raises FileExistsError if it is there.  Of several that try, one succeeds."""
        with _writing(self) as store:
            store.pipe_file(str(self), data, mode="create")

    def upload(self, file: pathlib.Path) -> None:
        """Writes an object with the content of a local file, which may be large, whole or not at all."""
        with _writing(self) as store:
            store.put_file(str(file), str(self))

    def download(self, folder: pathlib.Path) -> None:
        """Copies what is in this folder into a local one."""
        with _asking(self) as store:
            for name in store.find(str(self)):
                inner = name[len(str(self).partition("://")[2]) :].strip("/")
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                store.get_file(name, str(folder / inner))

    def remove(self) -> None:
        """Deletes an object, or a folder with all that is in it; nothing if there is none."""
        with _asking(self) as store, contextlib.suppress(FileNotFoundError):
            store.rm(str(self), recursive=True)
        if self.exists():  # S3 says of each object whether it was deleted, and s3fs says nothing of it
            raise StoreError.lasting(str(self), "the store does not delete it; expected the permission to")

    def _info(self) -> dict[str, Any] | None:
        with _asking(self) as store:
            try:  # not `store.exists`, to which an object that cannot be asked for is none
                return dict(store.info(str(self)))
            except FileNotFoundError:
                return None


# So that it is tried for about half a minute, as gcsfs does of itself.
_OPTIONS = {"s3": {"config_kwargs": {"retries": {"mode": "legacy", "max_attempts": 6}}}}


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec  # only here needed

    for name in ("gcsfs", "s3fs", "fsspec", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they print what they raise, with its traceback
    try:
        # Without a cache, since others write here, too: people their answers.
        return fsspec.filesystem(scheme, use_listings_cache=False, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        raise UsageError(
            f"{scheme}://: {error}; a directory in an object store needs packages of its own: "
            "pip install 'activedpo_jax[remote]'"
        ) from error


@contextlib.contextmanager
def _asking(path: RemotePath) -> Iterator[Any]:
    try:
        yield _file_system(str(path).partition(":")[0])
    except (FileNotFoundError, FileExistsError, StoreError, UsageError):
        raise
    except Exception as error:
        if found := store_error(error, str(path)):
            raise found from error
        raise


@contextlib.contextmanager
def _writing(path: RemotePath) -> Iterator[Any]:
    for lock in _locks.values():
        lock.assure(path)
    try:
        with _asking(path) as store:
            yield store
    except FileNotFoundError as error:
        bucket = "/".join(str(path).split("/")[:3])
        raise StoreError.lasting(bucket, "there is no such bucket") from error


@functools.cache
def local_copy(folder: RemotePath) -> pathlib.Path:
    """A local copy of a folder, for as long as this process lives."""
    place = tempfile.TemporaryDirectory(prefix="activedpo_jax_")
    atexit.register(place.cleanup)
    folder.download(pathlib.Path(place.name))
    return pathlib.Path(place.name)


class _Lock:
    """A lock that this process holds, renewed by a thread until the process ends."""

    def __init__(self, workdir: RemotePath, number: int) -> None:
        self._workdir, self._number = workdir, number
        self._renewed = time.monotonic()
        self._mutex, self._released = threading.Lock(), threading.Event()
        threading.Thread(target=self._renew_for_ever, daemon=True).start()

    def assure(self, path: RemotePath) -> None:
        """Raises StoreError if somebody may have taken over; called before each write under the directory."""
        if time.monotonic() - self._renewed > STALE_SECONDS / 2 and path.is_relative_to(self._workdir):
            self._renew()

    def release(self) -> None:
        """Lets another process take the directory at once."""
        with contextlib.suppress(Exception), self._mutex:
            self._released.set()
            self._write(_told() | {"released": True})

    def _renew_for_ever(self) -> None:
        while not self._released.wait(RENEWAL_SECONDS):
            with contextlib.suppress(Exception):  # whoever wants to write next hears of it
                self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._released.is_set():
                return
            if newer := [number for number in _numbers(self._workdir) if number > self._number]:
                holder = _holder(_read(self._workdir, max(newer)))
                raise StoreError.lasting(
                    str(self._workdir),
                    f"{holder} has taken over, since this process had not renewed its lock for {STALE_SECONDS} s; it "
                    "ends, and what it has not written yet is left to the other",
                )
            begun = time.monotonic()
            self._write(_told())
            self._renewed = begun

    def _write(self, content: dict[str, Any]) -> None:
        path = _lock_path(self._workdir, self._number)
        with _asking(path) as store:
            store.pipe_file(str(path), json.dumps(content).encode())


_locks: dict[RemotePath, _Lock] = {}


def lock(workdir: RemotePath) -> None:
    """Takes the directory for this process, until it ends; see the top of this file.

    Raises:
      ValueError: another process works there.
    """
    if workdir in _locks:
        return
    numbers = _numbers(workdir)
    newest = max(numbers, default=0)
    if newest:
        _wait_until_free(workdir, newest)
    try:
        _lock_path(workdir, newest + 1).create(json.dumps(_told()).encode())
    except FileExistsError as error:
        raise _taken(workdir, _read(workdir, newest + 1)) from error
    _locks[workdir] = _Lock(workdir, newest + 1)
    for old in numbers:
        _lock_path(workdir, old).remove()


def release_locks() -> None:
    """At the end of a process: the next one need not wait.  Without it the lock is free once it is stale."""
    while _locks:
        _locks.popitem()[1].release()


def _wait_until_free(workdir: RemotePath, number: int) -> None:
    before, begun = _read(workdir, number), time.monotonic()
    if before.get("released") or _is_gone(before):
        return
    print(f"{workdir}: waiting up to {STALE_SECONDS} s to see whether {_holder(before)} still works here", flush=True)
    while time.monotonic() - begun < STALE_SECONDS:
        time.sleep(min(RENEWAL_SECONDS, STALE_SECONDS) / 5)
        now = _read(workdir, number)
        if now.get("released"):
            return
        if now != before:
            raise _taken(workdir, now)


def _taken(workdir: RemotePath, holder: dict[str, Any]) -> ValueError:
    return ValueError(f"{workdir}: {_holder(holder)} works here; wait for its end, or give another --workdir")


def _told() -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "time": time.time()}


def _machine() -> str:
    """What tells machines apart, and containers of one, in which process numbers mean something else."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    process = int(holder["process"])
    return process == os.getpid() or not os.path.exists(f"/proc/{process}")


def _holder(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _lock_path(workdir: RemotePath, number: int) -> RemotePath:
    return workdir / ".lock" / f"{number:06d}"


def _numbers(workdir: RemotePath) -> list[int]:
    try:
        return sorted(int(path.name) for path in (workdir / ".lock").iterdir())
    except FileNotFoundError:
        return []


def _read(workdir: RemotePath, number: int) -> dict[str, Any]:
    try:
        return dict(json.loads(_lock_path(workdir, number).read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}
