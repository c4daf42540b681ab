"""Long work that a killed process need not begin again: what is kept of it, and the loop that keeps it.

The work is a row of pieces, each of which depends on nothing that changes meanwhile.  How it is kept is the business of
whoever runs it: see `record.saved_work`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from activedpo_jax import profiling


class SavedWork(Protocol):
    """What is kept of some work under way, by the name of its stage."""

    def spans(self, stage: str) -> Sequence[tuple[int, int]]:
        """Which pieces are kept, as (first, end) of consecutive ones, in order and without gaps, from 0."""
        ...

    def restore(self, stage: str, span: tuple[int, int], like: Any) -> Any | None:
        """The tree kept for these pieces, with the shapes, dtypes and shardings of `like`; None: it is damaged."""
        ...

    def save(self, stage: str, span: tuple[int, int], tree: Any) -> None:
        """Keeps a tree for these pieces, beside what is kept of those before."""
        ...

    def replace(self, stage: str, count: int, tree: Any) -> None:
        """Keeps a tree that stands for all of the first `count` pieces."""
        ...

    def is_due(self) -> bool:
        """Whether what has been done since the last time should be kept now.  Every process asks after each piece."""
        ...

    def lasts(self, number: int) -> None:
        """What is kept of round `number` and of those after it is needed in later rounds, too."""
        ...

    def of_round(self, number: int) -> "SavedWork":
        """What is kept of the same part of another round, to be read."""
        ...

    def stages(self, beginning: str) -> Sequence[str]:
        """The names of the stages of which something is kept that begin so."""
        ...


class NothingSaved:
    """For work that is short, or begins again."""

    def spans(self, stage: str) -> Sequence[tuple[int, int]]:
        return ()

    def restore(self, stage: str, span: tuple[int, int], like: Any) -> Any:
        raise AssertionError("nothing is kept")

    def save(self, stage: str, span: tuple[int, int], tree: Any) -> None:
        pass

    def replace(self, stage: str, count: int, tree: Any) -> None:
        raise AssertionError("nothing is due")

    def is_due(self) -> bool:
        return False

    def lasts(self, number: int) -> None:
        pass

    def of_round(self, number: int) -> "NothingSaved":
        return self

    def stages(self, beginning: str) -> Sequence[str]:
        return ()


NOTHING_SAVED = NothingSaved()


def pieces(
    saved: SavedWork,
    stage: str,
    count: int,
    compute: Callable[[int], Any],
    like: Callable[[int], Any],
    complete: bool = False,
) -> Iterator[Any]:
    """The results of `compute(0)` to `compute(count − 1)`, those that are kept first; keeps the others from time to
    time.

    Args:
      like: of the number of a piece, the shapes, dtypes and shardings of its result.
      complete: all are kept at the end, since they are needed later.
    """
    done = 0
    for first, end in saved.spans(stage):
        kept = saved.restore(stage, (first, end), [like(i) for i in range(first, end)])
        if kept is None:
            break
        yield from kept
        done = end
    fresh: list[Any] = []
    for i in range(done, count):
        fresh.append(profiling.piece(stage, functools.partial(compute, i)))
        yield fresh[-1]
        if saved.is_due() or (complete and i + 1 == count):
            saved.save(stage, (i + 1 - len(fresh), i + 1), fresh)
            fresh = []
