"""Checkpoints where Orbax cannot write them, in `s3://`: it writes and reads them on this machine, and they are copied.

A checkpoint is whole once it has `commit_success.txt`, which is written last and deleted first, as Orbax has it in
`gs://`.  One process can do that; several, each with its part of every checkpoint, would need a disk that all of them
see, since Orbax has the first of them put the parts together.
"""

import concurrent.futures
import pathlib
import shutil
import tempfile
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from activedpo_jax import hosts
from activedpo_jax.remote import RemotePath, in_store

LAST_WRITTEN = "commit_success.txt"


def is_copied(path: pathlib.Path) -> bool:
    """Whether what is saved there has to be copied."""
    return in_store(path) is not None and str(path).startswith("s3://")


def check_processes(folder: pathlib.Path) -> None:
    """Raises ValueError if several processes would save there."""
    if is_copied(folder) and hosts.several():
        raise ValueError(
            f"{folder}: several processes save their checkpoints together, which Orbax cannot do in s3://; expected "
            "one process, or a directory in gs:// or on a disk that all hosts share: give another --workdir"
        )


class Checkpointer:
    """`ocp.StandardCheckpointer`, as far as it is used here, for paths in such a store."""

    def __init__(self) -> None:
        self._orbax = ocp.StandardCheckpointer()
        self._stage = tempfile.TemporaryDirectory(prefix="activedpo_jax_")
        self._sender = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: concurrent.futures.Future[None] | None = None

    def save(self, path: RemotePath, tree: Any, force: bool = True) -> None:
        """Begins to save, in the background; replaces what is there."""
        self.wait_until_finished()
        check_processes(path)  # type: ignore[arg-type]
        self._orbax.save(self._local(path), tree, force=True)
        self._sending = self._sender.submit(self._send, path)

    def wait_until_finished(self) -> None:
        """Returns once everything is in the store; raises what has prevented it."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def metadata(self, path: RemotePath) -> Any:
        """What there is to restore; a copy of it stays until it is."""
        return self._orbax.metadata(self._fetch(path))

    def restore(self, path: RemotePath, target: Any) -> Any:
        local = self._fetch(path)
        try:
            return self._orbax.restore(local, target)
        finally:
            shutil.rmtree(local)

    def close(self) -> None:
        self.wait_until_finished()
        self._sender.shutdown()
        self._orbax.close()
        self._stage.cleanup()

    def _local(self, path: RemotePath) -> epath.Path:
        return epath.Path(self._stage.name) / str(path).partition("://")[2]

    def _send(self, path: RemotePath) -> None:
        self._orbax.wait_until_finished()
        local = pathlib.Path(self._local(path))
        try:
            delete(path)
            for file in sorted(local.rglob("*")):
                if file.is_file() and file.name != LAST_WRITTEN:
                    (path / file.relative_to(local)).upload(file)
            (path / LAST_WRITTEN).write_bytes(b"")
        finally:
            shutil.rmtree(local)

    def _fetch(self, path: RemotePath) -> epath.Path:
        local = self._local(path)
        if not local.exists():
            path.download(pathlib.Path(local))
        return local


class Manager:
    """`ocp.CheckpointManager`, as far as it is used here, for a folder in such a store."""

    def __init__(self, folder: RemotePath, kept: int) -> None:
        self._folder, self._kept = folder, kept
        self._checkpointer = Checkpointer()

    def all_steps(self) -> list[int]:
        if not self._folder.exists():
            return []
        paths = [path for path in self._folder.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in paths if (path / LAST_WRITTEN).exists())

    def save(self, step: int, args: Any) -> None:
        self._checkpointer.save(self._folder / str(step), args.item)

    def wait_until_finished(self) -> None:
        """Deletes all but the newest, and what a kill has left unfinished, once what was being saved is there."""
        self._checkpointer.wait_until_finished()
        kept = {str(step) for step in self.all_steps()[-self._kept :]}
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if path.name not in kept:
                delete(path)

    def item_metadata(self, step: int) -> Any:
        return self._checkpointer.metadata(self._folder / str(step)).item_metadata

    def restore(self, step: int, args: Any) -> Any:
        return self._checkpointer.restore(self._folder / str(step), args.item)

    def delete(self, step: int) -> None:
        delete(self._folder / str(step))

    def close(self) -> None:
        self._checkpointer.close()


def delete(path: RemotePath) -> None:
    """Deletes a checkpoint so that it is not whole while some of it is there."""
    (path / LAST_WRITTEN).remove()
    path.remove()
