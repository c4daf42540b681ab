"""Work in progress on disk, so that a kill costs minutes of a stage and not the stage.

DIR/partial/NNN/<part>/<stage>/<first>-<end>/    of a part of round NNN, pieces of a stage (features, responses,
                                                 log-probs), or the state after `end` steps of training

What a part of a round depends on is in its name: training on other labels is another part.  Orbax writes in the
background, every process its own shards.  All is deleted once what came of it is saved, and no later round needs it.
"""

import copy
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from activedpo_jax import errors, files, hosts
from activedpo_jax.record.checkpoints import Clock, abstract, checkpointer_for, each_error_once, is_whole, place_of

Span = tuple[int, int]


class SavedWork:
    """What is kept of the work in a folder; see `resumable.SavedWork`.

    Args:
      folder: of a run or a stage.
      minutes: of work that a kill may cost.
    """

    def __init__(self, folder: pathlib.Path, minutes: float) -> None:
        self._root, self._clock = folder.absolute() / "partial", Clock(minutes)
        self._folder = self._root / "000" / "all"
        self._writer = checkpointer_for(self._root)
        self._obsolete: pathlib.Path | None = None  # replaced by what is being written
        self._lasting: int | None = None  # the first of the rounds that are needed in later ones

    def spans(self, stage: str) -> Sequence[Span]:
        found: list[Span] = []
        for first, end in _spans(self._folder / stage):
            if found and first == 0:
                found = []  # it stands for all before it
            if first == (found[-1][1] if found else 0):
                found.append((first, end))
        return found

    def restore(self, stage: str, span: Span, like: Any) -> Any | None:
        path = self._path(stage, span)
        try:
            with each_error_once():
                return self._writer.restore(place_of(path), abstract(like))
        except errors.StoreError:
            raise
        except Exception as error:  # of many kinds: what Orbax raises depends on which of its files is damaged
            reason = " ".join(str(error).split())[:200]
            print(f"{path}: cannot be read, and is done again ({type(error).__name__}: {reason})", flush=True)
            return None

    def save(self, stage: str, span: Span, tree: Any) -> None:
        with each_error_once():
            self._finish()
            self._writer.save(place_of(self._path(stage, span)), tree, force=True)
        self._clock.restart()
        if hosts.any_of(errors.signalled()):
            self._finish()
            errors.end()

    def replace(self, stage: str, count: int, tree: Any) -> None:
        before = self.spans(stage)
        self.save(stage, (0, count), tree)
        self._obsolete = self._path(stage, before[-1]) if before else None

    def is_due(self) -> bool:
        return self._clock.is_due()

    def lasts(self, number: int) -> None:
        self._lasting = number

    def of_round(self, number: int) -> "SavedWork":
        other = copy.copy(self)
        other._folder = self._root / f"{number:03d}" / self._folder.name
        return other

    def stages(self, beginning: str) -> Sequence[str]:
        return [name for name in _names(self._folder) if name.startswith(beginning)]

    def enter(self, number: int, part: str) -> None:
        """From here on the work is this part of round `number`."""
        self._finish()
        self._folder = self._root / f"{number:03d}" / part
        self._clock.restart()

    def forget_others(self) -> None:
        """Deletes the work of the rounds before, which has led to a checkpoint, unless it is needed still."""
        now = int(self._folder.parent.name)
        _delete_before(self._root, now if self._lasting is None else min(now, self._lasting))

    def forget(self) -> None:
        """Deletes all work: what came of it is saved."""
        self._finish()
        hosts.on_first(files.remove_folder)(self._root)

    def close(self) -> None:
        self._finish()
        self._writer.close()

    def _finish(self) -> None:
        self._writer.wait_until_finished()
        if self._obsolete is not None:
            hosts.on_first(files.remove_folder)(self._obsolete)
            self._obsolete = None

    def _path(self, stage: str, span: Span) -> pathlib.Path:
        return self._folder / stage / f"{span[0]:06d}-{span[1]:06d}"


@hosts.on_first
def _delete_before(folder: pathlib.Path, number: int) -> None:
    for name in _names(folder):
        if int(name) < number:
            files.remove_folder(folder / name)


@hosts.on_first
def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@hosts.on_first
def _spans(folder: pathlib.Path) -> list[Span]:
    """The spans in a folder, those that begin first before those that begin later, and of these the shorter first."""
    if not folder.exists():
        return []
    names = [re.fullmatch(r"(\d+)-(\d+)", path.name) for path in folder.iterdir() if is_whole(path)]
    return sorted((int(name[1]), int(name[2])) for name in names if name)
