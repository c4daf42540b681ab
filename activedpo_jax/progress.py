"""The progress of a piece of work: a bar on a terminal, an occasional line in a log."""

import operator
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

from activedpo_jax import hosts

_SECONDS = 30.0  # between two lines


class Progress(Protocol):
    """The part of `tqdm` that is used."""

    def __iter__(self) -> Iterator[Any]:
        """The iterable's items, each counted once it has been worked on."""
        ...

    def update(self, n: int = 1) -> Any:
        """Counts n more."""
        ...

    def set_postfix(self, **values: Any) -> None:
        """Sets the values shown after the bar; `refresh=False` waits for the next update."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, initial: int = 0, desc: str, unit: str
) -> Progress:
    """Shows the progress of a loop over `iterable`, or of what `update` counts.

    On a terminal this is tqdm's bar, which disappears at the end.  Elsewhere it is a line on stderr every 30 seconds,
    `features: 120/1024 prompt, 2.1/s`, so that short work prints nothing; of several processes, the first one's.

    Args:
      total: number of units; None: the iterable's length, if it has one.
      initial: units done before.
      desc: what is done; unit: what is counted.
    """
    if sys.stderr.isatty() and hosts.is_first():
        return tqdm(iterable, total=total, initial=initial, desc=desc, unit=unit, leave=False)
    return _Lines(iterable, total, initial, desc, unit)


class _Lines:
    def __init__(self, iterable: Iterable[Any] | None, total: int | None, initial: int, desc: str, unit: str) -> None:
        if total is None:
            total = operator.length_hint(iterable, 0) or None
        self._iterable, self._total, self._desc, self._unit = iterable, total, desc, unit
        self._initial = self._done = initial
        self._postfix: dict[str, Any] = {}
        self._start = self._shown = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in () if self._iterable is None else self._iterable:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._shown >= _SECONDS and hosts.is_first():
            self._shown = now
            print(self._line(now - self._start), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        rate = (self._done - self._initial) / seconds
        speed = f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.2g}/min"
        postfix = (f"{name}={value}" for name, value in self._postfix.items())
        return ", ".join([f"{self._desc}: {count} {self._unit}", speed, *postfix])

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        self._postfix = values

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
