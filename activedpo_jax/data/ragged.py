"""Sequences without a Python object for each item: arrays of different lengths end to end, and items made on demand.

What works on texts takes these as well as plain lists of arrays.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

from activedpo_jax.data.store import Column

_BLOCK = 1 << 16  # items

_Item = TypeVar("_Item")


class Lazy(Sequence[_Item], Generic[_Item]):
    """A sequence whose items are made when they are asked for; equal to any sequence of equal items.

    Args:
      item: makes the item of a row from 0 to `count` − 1.
    """

    def __init__(self, count: int, item: Callable[[int], _Item]) -> None:
        self._count, self._item = count, item

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, row: int) -> _Item: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[_Item]: ...
    def __getitem__(self, row: int | slice) -> _Item | Sequence[_Item]:
        if isinstance(row, slice):
            return [self._item(i) for i in range(*row.indices(self._count))]
        if not -self._count <= row < self._count:
            raise IndexError(f"row {row} of {self._count}")
        return self._item(int(row) % self._count)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Ragged(Sequence[np.ndarray]):
    """Arrays [length] of one dtype, end to end in `flat`.

    Args:
      flat: [total].
      starts: [n + 1] int64, where in `flat` each array begins and the last one ends.
    """

    def __init__(self, flat: np.ndarray, starts: np.ndarray) -> None:
        self.flat, self.starts = flat, starts

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, row: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.flat[self.starts[row] : self.starts[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self), _BLOCK):
            bounds = self.starts[first : first + _BLOCK + 1].tolist()
            for begin, end in itertools.pairwise(bounds):
                yield self.flat[begin:end]


class Nested(Lazy[list[np.ndarray]]):
    """Groups of consecutive arrays.

    Args:
      starts: [n + 1] int64, which of the arrays is the first of each group; every group has one at least.
    """

    def __init__(self, arrays: Ragged, starts: np.ndarray) -> None:
        super().__init__(len(starts) - 1, self._group)
        self.arrays, self.starts = arrays, starts

    def _group(self, row: int) -> list[np.ndarray]:
        bounds = self.arrays.starts[self.starts[row] : self.starts[row + 1] + 1].tolist()
        return [self.arrays.flat[begin:end] for begin, end in itertools.pairwise(bounds)]


class Strings(Lazy[str]):
    """Texts, of which `utf8` are the bytes."""

    def __init__(self, utf8: Ragged) -> None:
        super().__init__(len(utf8), lambda row: utf8[row].tobytes().decode())
        self._utf8 = utf8

    def __iter__(self) -> Iterator[str]:
        return (text.tobytes().decode() for text in self._utf8)


class Chained(Lazy[_Item]):
    """The items of several sequences, one after the other."""

    def __init__(self, *parts: Sequence[_Item]) -> None:
        starts = np.cumsum([0, *map(len, parts)])

        def item(row: int) -> _Item:
            part = int(np.searchsorted(starts, row, side="right")) - 1
            return parts[part][row - int(starts[part])]

        super().__init__(int(starts[-1]), item)
        self.parts = parts


class Taken(Lazy[_Item]):
    """The items of rows [n]."""

    def __init__(self, items: Sequence[_Item], rows: np.ndarray) -> None:
        super().__init__(len(rows), lambda row: items[rows[row]])
        self.items, self.rows = items, rows


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where arrays of these lengths [n] begin when they lie end to end, and where the last ends: [n + 1] int64."""
    starts, total = Column(np.int64), 0
    starts.append([0])
    for first in range(0, len(lengths), _BLOCK):
        ends = total + np.cumsum(lengths[first : first + _BLOCK], dtype=np.int64)
        starts.append(ends)
        total = int(ends[-1])
    return starts.array()


def lengths_of(arrays: Sequence[Any]) -> np.ndarray:
    """The length of each array, [n] int64."""
    if isinstance(arrays, Chained):
        return np.concatenate([lengths_of(part) for part in arrays.parts])
    if isinstance(arrays, Taken):
        return lengths_of(arrays.items)[arrays.rows]
    if isinstance(arrays, Ragged):
        return arrays.lengths
    return np.fromiter(map(len, arrays), np.int64, len(arrays))


def sizes_of(groups: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The number of arrays in each group, [n] int64."""
    if isinstance(groups, Chained):
        return np.concatenate([sizes_of(part) for part in groups.parts])
    if isinstance(groups, Taken):
        return sizes_of(groups.items)[groups.rows]
    if isinstance(groups, Nested):
        return np.diff(groups.starts)
    return lengths_of(groups)


def longest_of(groups: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The length of the longest array of each group, [n] int64."""
    return _of_lengths(groups, np.maximum, max)


def totals_of(groups: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The length of all arrays of each group together, [n] int64."""
    return _of_lengths(groups, np.add, sum)


def lengths_each(groups: Sequence[Sequence[np.ndarray]], most: int) -> np.ndarray:
    """The length of each array of each group, [n, most] int64; 0 where a group has fewer than `most`."""
    if isinstance(groups, Chained):
        return np.concatenate([lengths_each(part, most) for part in groups.parts])
    if isinstance(groups, Taken):
        return lengths_each(groups.items, most)[groups.rows]
    out = np.zeros((len(groups), most), np.int64)
    if isinstance(groups, Nested):
        sizes = np.diff(groups.starts)
        row = np.repeat(np.arange(len(groups)), sizes)
        out[row, np.arange(len(row)) - groups.starts[row]] = groups.arrays.lengths
        return out
    for several, lengths in zip(groups, out, strict=True):
        lengths[: len(several)] = [len(array) for array in several]
    return out


def _of_lengths(
    groups: Sequence[Sequence[np.ndarray]], at_once: np.ufunc, one: Callable[[Iterable[int]], int]
) -> np.ndarray:
    if isinstance(groups, Chained):
        return np.concatenate([_of_lengths(part, at_once, one) for part in groups.parts])
    if isinstance(groups, Taken):
        return _of_lengths(groups.items, at_once, one)[groups.rows]
    if isinstance(groups, Nested):
        return at_once.reduceat(groups.arrays.lengths, groups.starts[:-1])
    return np.fromiter((one(map(len, several)) for several in groups), np.int64, len(groups))


def largest(arrays: Sequence[np.ndarray]) -> int:
    """The largest entry of any array; −1 if there is none."""
    if isinstance(arrays, Ragged):
        flat = arrays.flat
        arrays = [flat[i : i + _BLOCK] for i in range(0, len(flat), _BLOCK)]
    return max((int(array.max()) for array in arrays if len(array)), default=-1)
