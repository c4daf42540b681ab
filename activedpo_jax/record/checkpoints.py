"""State on disk, through Orbax: what a run needs to resume."""

import contextlib
import functools
import logging
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from activedpo_jax import errors, hosts
from activedpo_jax.record import copied_checkpoints
from activedpo_jax.remote import in_store


class Checkpoints:
    """The checkpoints of one run, one a round; the newest two are kept.

    A checkpoint becomes visible only when it is whole, so a process killed while saving leaves the one before.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder.absolute() / "checkpoints"
        self._manager = _manager(self._folder, kept=2)

    def save(self, round_number: int, state: Any) -> None:
        """Begins to save, in the background; `wait` for the end before anything is recorded that builds on it."""
        with each_error_once():
            self._manager.wait_until_finished()
            self._manager.save(round_number, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        """Returns once everything is on disk."""
        with each_error_once():
            self._manager.wait_until_finished()

    def restore(self, round_number: int, like: Any) -> Any:
        """The state of that round, with the shapes, dtypes and shardings of `like`.

        Where an array of `like` has more rows, as in a run that is to have more rounds, what was saved comes first and
        the rest is that of `like`.
        """
        with each_error_once():
            saved = _shapes(self._manager.item_metadata(round_number).tree)
            shapes = jax.tree.map_with_path(lambda path, x: _less_rows(x, saved.get(_name(path))), abstract(like))
            state = self._manager.restore(round_number, args=ocp.args.StandardRestore(shapes))
        return jax.tree.map(lambda x, whole: x if x.shape == whole.shape else _put_first(x, whole), state, like)

    def restore_latest(self, like: Any) -> tuple[int | None, Any]:
        """The newest state that can be read, and its round; (None, None) if none was saved.

        A newer one that is damaged is named, and deleted, so that its round can be saved again.

        Raises:
          ValueError: there are checkpoints, and none of them can be read.
        """
        rounds = sorted(self._manager.all_steps(), reverse=True)
        hosts.on_first(_check_listing)(self._folder, rounds)
        for number in rounds:
            try:
                state = self.restore(number, like)
            except errors.StoreError:
                raise
            except Exception as error:  # of many kinds: what Orbax raises depends on which of its files is damaged
                reason = " ".join(str(error).split())[:200]
                print(f"{self._folder / str(number)}: cannot be read ({type(error).__name__}: {reason})", flush=True)
                continue
            for newer in rounds[: rounds.index(number)]:
                self._manager.delete(newer)
            return number, state
        if rounds:
            raise ValueError(f"{self._folder}: no checkpoint can be read; restore the files, or give another --workdir")
        return None, None

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _manager(folder: pathlib.Path, kept: int) -> Any:
    if copied_checkpoints.is_copied(folder):
        return copied_checkpoints.Manager(place_of(folder), kept)
    options = ocp.CheckpointManagerOptions(max_to_keep=kept)
    handler = ocp.StandardCheckpointHandler()
    return ocp.CheckpointManager(place_of(folder), options=options, item_handlers=handler)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(metadata)}


def _less_rows(like: jax.ShapeDtypeStruct, saved: tuple[int, ...] | None) -> jax.ShapeDtypeStruct:
    """With the number of rows that were saved, if these are fewer and nothing else differs."""
    if not saved or saved == like.shape or saved[1:] != like.shape[1:] or saved[0] > like.shape[0]:
        return like
    return jax.ShapeDtypeStruct(saved, like.dtype, sharding=like.sharding)


def _put_first(rows: jax.Array, whole: jax.Array) -> jax.Array:
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=0, axis=0)
    return jax.jit(write, out_shardings=whole.sharding)(whole, rows)


class Clock:
    """Says when what has been done since the last time should be saved.

    Args:
      minutes: of work that a kill may cost; 0: it is always time.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether the time is over, or a signal waits, on any process; all of them have to ask."""
        return hosts.any_of(time.monotonic() - self._last >= self._seconds or errors.signalled())


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Writes one pytree of arrays, all or nothing."""
    with each_error_once(), contextlib.closing(checkpointer_for(path)) as checkpointer:
        checkpointer.save(place_of(path), tree, force=True)


def restore_tree(path: pathlib.Path, like: Any) -> Any:
    """Reads what `save_tree` wrote, with the shapes, dtypes and shardings of `like`."""
    with each_error_once(), contextlib.closing(checkpointer_for(path)) as checkpointer:
        return checkpointer.restore(place_of(path), abstract(like))


def checkpointer_for(path: pathlib.Path) -> Any:
    """What saves and restores pytrees at this path, or below it."""
    return copied_checkpoints.Checkpointer() if copied_checkpoints.is_copied(path) else ocp.StandardCheckpointer()


def place_of(path: pathlib.Path) -> Any:
    """A path as its checkpointer takes it."""
    return path if copied_checkpoints.is_copied(path) else epath.Path(os.fspath(path.absolute()))


def is_whole(path: pathlib.Path) -> bool:
    """Whether there is a pytree that `save_tree` has finished: on disk its name tells, which it gets at the end."""
    return (path / copied_checkpoints.LAST_WRITTEN).exists() if in_store(path) else path.exists()


def _check_listing(folder: pathlib.Path, rounds: Sequence[int]) -> None:
    """Ends the run where Orbax has missed a checkpoint: it takes what an object store fails to list for absent."""
    if not in_store(folder) or not folder.exists():
        return
    there = {int(path.name) for path in folder.iterdir() if path.name.isdecimal() and is_whole(path)}
    if missed := there - set(rounds):
        raise errors.StoreError.passing(str(folder), f"the store has not listed the checkpoint {max(missed)}")


@contextlib.contextmanager
def each_error_once() -> Iterator[None]:
    """Keeps errors that are raised out of Orbax's log, which has them with a traceback for each thread.

    Errors that Orbax logs while nothing is raised appear in the log, if only at the end.
    """
    _drop_echoes()
    held: list[logging.LogRecord] = []

    def has_no_traceback(record: logging.LogRecord) -> bool:
        if record.exc_info:
            held.append(record)
        return not record.exc_info

    logger = absl_logging.get_absl_logger()
    logger.addFilter(has_no_traceback)
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if found := errors.store_error_of_checkpoints(error):
            raise found from error
        raise
    finally:
        logger.removeFilter(has_no_traceback)
    for record in held:
        logger.handle(record)


@functools.cache
def _drop_echoes() -> None:
    """Keeps off stderr what is raised elsewhere.

    A save in the background that fails: the next wait for it raises its error.  And the writes that were under way when
    another one failed: they end at any time, up to the end of the process, and TensorStore reports that the event loop
    which waited for them is closed, and asyncio that nobody asked for their errors.
    """
    hook = sys.unraisablehook

    def report_others(raised: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
            hook(raised)

    def is_not_from_orbax(record: logging.LogRecord) -> bool:
        frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
        return not any(frame.filename.startswith(_ORBAX) for frame in frames)

    def is_not_of_a_save(record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.threadName == _SAVING_THREAD)

    sys.unraisablehook = report_others
    absl_logging.get_absl_logger().addFilter(is_not_of_a_save)
    logging.getLogger("asyncio").addFilter(is_not_from_orbax)


_SAVING_THREAD = "async_save"  # Orbax's name for it
_ORBAX = str(pathlib.Path(ocp.__file__).parent)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, or of their like."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
