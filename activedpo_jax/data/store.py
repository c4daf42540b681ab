"""Columns of data that may outgrow memory, written once from front to back, by one process or by several together.

A column lies in memory while it is small, and else in a temporary file without a name: the file vanishes with the
process, whatever ends it.  The environment variable TMPDIR says on which disk.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

_IN_MEMORY = 1 << 20  # bytes
_EXCHANGED = 1 << 26  # bytes of all processes together that are exchanged at a time

_Result = TypeVar("_Result")
_Scalar = TypeVar("_Scalar", bound=np.generic)


class Column(Generic[_Scalar]):
    """A one-dimensional array that grows at its end."""

    def __init__(self, dtype: type[_Scalar]) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115, lives as long as the column
        self._bytes = 0

    def append(self, values: Any) -> None:
        """Adds an array of any shape, in C order.

        Raises:
          OSError: the disk of the temporary files is full; names their folder.
        """
        self.write(self._bytes, np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8))

    def write(self, place: int, content: np.ndarray) -> None:
        """Writes bytes [n] from `place` on, beyond the end if need be."""
        try:
            self._file.seek(place)
            self._file.write(content.data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{tempfile.gettempdir()} (set TMPDIR to another)") from error
        self._bytes = max(self._bytes, place + content.size)

    def array(self) -> np.ndarray[Any, np.dtype[_Scalar]]:
        """What was written, read-only: [n] in memory, or mapped from the disk.  Nothing can be added after that."""
        if self._bytes <= _IN_MEMORY:
            self._file.seek(0)
            return np.frombuffer(self._file.read(), self._dtype)
        self._file.flush()
        return np.asarray(np.memmap(self._file, self._dtype, "r"))


def scratch(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros to write to, in memory or mapped from a temporary file without a name.

    Raises:
      OSError: the disk of the temporary files is full; names their folder.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= _IN_MEMORY:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:  # lives on as long as it is mapped
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would end the process when it is written to
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{tempfile.gettempdir()} (set TMPDIR to another)") from error
        return np.memmap(file, dtype, "r+", shape=shape)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes that prepare data together, each a share of it."""

    index: int  # of this process
    count: int
    # From uint8 [n] of this process to those of all processes, by index; n differs.  All processes call it equally
    # often.
    exchange: Callable[[np.ndarray], Sequence[np.ndarray]]

    def share(self, total: int) -> range:
        """The part of `total` items that falls to this process; the parts of all, one after the other, are whole."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def together(self, work: Callable[[], _Result]) -> _Result:
        """This process's part of some work.

        Raises:
          ValueError: that of the first process that raised one, on all of them.
        """
        result, problem = None, None
        try:
            result = work()
        except ValueError as error:
            if self.count == 1:
                raise
            problem = error
        messages = self.texts("" if problem is None else str(problem) or "ValueError")
        if first := next(filter(None, messages), None):
            raise ValueError(first) from problem
        return result  # type: ignore[return-value]

    def agree(self, what: str, value: str) -> None:
        """Checks that all processes found the same.

        Raises:
          ValueError: one did not; says which, and what each found.
        """
        first, *others = self.texts(value)
        for index, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"{what}: process {index} found {other}, process 0 {first}; expected the same on every host: give "
                    "all of them the same files"
                )

    def texts(self, text: str) -> list[str]:
        """The texts that the processes give, by index."""
        return [x.tobytes().decode() for x in self.exchange(np.frombuffer(text.encode(), np.uint8))]

    def joined(self, column: Column[_Scalar]) -> np.ndarray[Any, np.dtype[_Scalar]]:
        """The columns of all processes, one after the other, on each: bit for bit what one process would have."""
        mine = column.array()
        if self.count == 1:
            return mine
        content = mine.view(np.uint8)
        sizes = [int(x.view(np.int64)[0]) for x in self.exchange(np.array([content.size], np.int64).view(np.uint8))]
        starts = np.cumsum([0, *sizes])
        whole, step = Column[_Scalar](mine.dtype.type), _EXCHANGED // self.count
        for place in range(0, max(sizes), step):
            for start, part in zip(starts, self.exchange(content[place : place + step]), strict=False):
                whole.write(int(start) + place, np.asarray(part))
        return whole.array()


ALONE = Hosts(0, 1, lambda mine: [mine])
