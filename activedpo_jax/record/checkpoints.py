"""State on disk, through Orbax: what a run needs to resume."""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging


class Checkpoints:
    """The checkpoints of one run, one a round; the newest two are kept.

    A checkpoint becomes visible only when it is whole, so a process killed while saving leaves the one before.
    """

    def __init__(self, folder: pathlib.Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._folder = folder.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """The last round that was saved, or None."""
        return self._manager.latest_step()

    def save(self, round_number: int, state: Any) -> None:
        with each_error_once():
            self._manager.save(round_number, args=ocp.args.StandardSave(state))
            self._manager.wait_until_finished()

    def restore(self, round_number: int, like: Any) -> Any:
        """The state of that round, with the shapes, dtypes and shardings of `like`."""
        with each_error_once():
            return self._manager.restore(round_number, args=ocp.args.StandardRestore(_abstract(like)))

    def restore_latest(self, like: Any) -> tuple[int | None, Any]:
        """The newest state that can be read, and its round; (None, None) if none was saved.

        A newer one that is damaged is named, and deleted, so that its round can be saved again.

        Raises:
          ValueError: there are checkpoints, and none of them can be read.
        """
        rounds = sorted(self._manager.all_steps(), reverse=True)
        for number in rounds:
            try:
                state = self.restore(number, like)
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
        self._manager.close()


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Writes one pytree of arrays, all or nothing."""
    with each_error_once(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree, force=True)


def restore_tree(path: pathlib.Path, like: Any) -> Any:
    """Reads what `save_tree` wrote, with the shapes, dtypes and shardings of `like`."""
    with each_error_once(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), _abstract(like))


@contextlib.contextmanager
def each_error_once() -> Iterator[None]:
    """Keeps the errors that are raised out of the log and off stderr, where they would stand once for each thread.

    Orbax logs them with their tracebacks; what it logs while nothing is raised appears in the log, if only at the end.
    TensorStore has the tracebacks of writes printed that are on their way when another one fails, and end, maybe after
    this, without the event loop that waited for them.
    """
    held: list[logging.LogRecord] = []
    hook = sys.unraisablehook

    def print_unless_without_loop(raised: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
            hook(raised)

    def has_no_traceback(record: logging.LogRecord) -> bool:
        if record.exc_info:
            held.append(record)
        return not record.exc_info

    logger = absl_logging.get_absl_logger()
    logger.addFilter(has_no_traceback)
    sys.unraisablehook = print_unless_without_loop
    try:
        yield
    finally:
        logger.removeFilter(has_no_traceback)
    sys.unraisablehook = hook
    for record in held:
        logger.handle(record)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
