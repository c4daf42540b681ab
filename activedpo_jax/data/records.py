"""The records of a data set: read, checked and named once, and read again when they are asked for.

Of a record that lies in a file its keys alone are in memory: its id, and a few numbers.  Records that were passed in
are a plain list, and what works on records takes either.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast, overload

import numpy as np

from activedpo_jax.data.digests import digests_of, first_repeat, occurrence
from activedpo_jax.data.preferences import Record, content_hash, parse_record, prompt_hash
from activedpo_jax.data.ragged import Lazy, Ragged, Strings, starts_of
from activedpo_jax.data.sources import Rows, fail, open_rows
from activedpo_jax.data.store import ALONE, Column, Hosts
from activedpo_jax.data.templates import Exchange

_BATCH = 1000  # records


class Named(Exchange, Protocol):
    """A record with an id, which may be empty; a dataclass."""

    @property
    def id(self) -> str: ...


_Named = TypeVar("_Named", bound=Named)
_Other = TypeVar("_Other", bound=Named)
_Item = TypeVar("_Item")
Parse = Callable[[Mapping[str, Any], str], _Named]  # from a row and its location


@dataclasses.dataclass(frozen=True)
class Keys:
    """What is known of every row of a data set without reading it again."""

    ids: Ragged  # UTF-8
    prompts: np.ndarray  # [n] uint64, of `prompt_hash`
    sizes: np.ndarray  # [n] int32, responses


class Records(Sequence[_Named], Generic[_Named]):
    """Some of the records of a data set, read one by one when they are asked for.

    Args:
      parse: makes a record of a row; where its id is empty, it becomes that in `keys`.
      chosen: [n] int64, ascending rows.
    """

    def __init__(self, rows: Rows, parse: Parse[_Named], keys: Keys, chosen: np.ndarray) -> None:
        self._rows, self._parse, self._keys, self._chosen = rows, parse, keys, chosen
        self._names = Strings(keys.ids)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, row: int) -> _Named: ...
    @overload
    def __getitem__(self, row: slice) -> "Records[_Named]": ...
    def __getitem__(self, row: int | slice) -> "_Named | Records[_Named]":
        if isinstance(row, slice):
            return self.taken(np.arange(*row.indices(len(self))))
        return next(iter(self.taken(np.arange(len(self))[[row]])))

    def __iter__(self) -> Iterator[_Named]:
        for row, fields in zip(self._chosen, self._rows.read(self._chosen), strict=True):
            yield _with_id(self._parse(fields, self._rows.location(row)), self._names, row)

    def taken(self, rows: np.ndarray) -> "Records[_Named]":
        """Those in ascending places [k] of these."""
        return Records(self._rows, self._parse, self._keys, self._chosen[rows])

    def distinct(self) -> "Records[_Named]":
        """The first of every prompt."""
        return self.taken(np.sort(np.unique(self.prompts, return_index=True)[1]))

    def seen_as(self, parse: Parse[_Other]) -> "Records[_Other]":
        """The same rows as other records, named by the hashes of their prompts."""
        digits = np.frombuffer(self._keys.prompts.astype(">u8").tobytes().hex().encode(), np.uint8)
        ids = Ragged(digits, np.arange(0, len(digits) + 1, 16))
        return Records(self._rows, parse, dataclasses.replace(self._keys, ids=ids), self._chosen)

    def location(self, row: int) -> str:
        return self._rows.location(int(self._chosen[row]))

    @property
    def ids(self) -> Sequence[str]:
        names, chosen = self._names, self._chosen  # alone: the ids outlive the rest
        if len(chosen) == len(names):
            return names
        return Lazy(len(chosen), lambda row: names[chosen[row]])

    @property
    def sizes(self) -> np.ndarray:
        """The number of responses of each, [n] int32."""
        return self._keys.sizes[self._chosen]

    @property
    def prompts(self) -> np.ndarray:
        """`prompt_hash` of each, [n] uint64."""
        return self._keys.prompts[self._chosen]


def read_records(source: str, split: str = "train", hosts: Hosts = ALONE) -> Records[Record]:
    """All records of a data set, in order.  Each is read and checked once; what is kept are the keys.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.
      hosts: each reads its share, and all get the keys of all.

    Raises:
      ValueError: the source cannot be read, a record is malformed, or an id is there twice; says which line (from 1)
        or row (from 0), what was expected, and what to change.  Nothing is dropped or repaired.
    """
    rows = shared_rows(lambda: open_rows(source, split), source, hosts)
    if not len(rows):
        raise ValueError(f"{source}: there is no record in it; expected one at least: check config.data")
    records = read_all(rows, parse_record, content_hash, hosts)
    check_ids(records.ids, records.location)
    return records


def named_records(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Record]:
    """The records of rows, each given with its location; a record without an id gets a hash of its content.

    Raises:
      ValueError: a record is malformed, or an id is there twice.
    """
    records = [parse_record(row, location) for location, row in rows]
    names = Strings(_Found(records, content_hash).keys(ALONE).ids)
    check_ids(names, lambda row: records[row].location)
    return [_with_id(record, names, row) for row, record in enumerate(records)]


def shared_rows(opened: Callable[[], Rows], source: str, hosts: Hosts) -> Rows:
    """The rows that each host has opened, which must be as many on all.

    Raises:
      ValueError: they are not.
    """
    rows = hosts.together(opened)
    hosts.agree(f"the number of records of {source}", str(len(rows)))
    return rows


def read_all(rows: Rows, parse: Parse[_Named], content: Callable[[_Named], int], hosts: Hosts) -> Records[_Named]:
    """All records of the rows, after each was read once.

    Args:
      content: 64 bits by which records without an id are named.

    Raises:
      ValueError: a record is malformed.
    """
    share = hosts.share(len(rows))

    def parsed() -> Iterator[_Named]:
        for row, fields in zip(share, rows.read(share), strict=True):
            yield parse(fields, rows.location(row))

    found = hosts.together(lambda: _Found(parsed(), content))
    return Records(rows, parse, found.keys(hosts), np.arange(len(rows)))


def check_ids(ids: Sequence[str], location: Callable[[int], str]) -> None:
    """Checks that every id is there once.

    Raises:
      ValueError: one is not; says where.
    """
    if repeat := first_repeat(digests_of(ids)):
        row, earlier = repeat
        fail(location(row), f"id {ids[row]!r} was given to {location(earlier)} already", "every id once")


def _with_id(record: _Named, names: Sequence[str], row: int) -> _Named:
    return record if record.id else dataclasses.replace(cast(Any, record), id=names[row])


class _Found(Generic[_Named]):
    """The keys of records as they are read; an id is empty where the data gives none."""

    def __init__(self, records: Iterable[_Named], content: Callable[[_Named], int]) -> None:
        self._ids, self._id_lengths, self._sizes = Column(np.uint8), Column(np.int32), Column(np.int32)
        self._contents, self._prompts = Column(np.uint64), Column(np.uint64)
        for batch in batches(records, _BATCH):
            names = [r.id.encode() for r in batch]
            self._ids.append(np.frombuffer(b"".join(names), np.uint8))
            self._id_lengths.append([len(name) for name in names])
            self._sizes.append([len(r.responses) for r in batch])
            self._contents.append([0 if r.id else content(r) for r in batch])
            self._prompts.append([prompt_hash(r.prompt) for r in batch])

    def keys(self, hosts: Hosts) -> Keys:
        """Those of all hosts, with an id for every record."""
        given = Ragged(hosts.joined(self._ids), starts_of(hosts.joined(self._id_lengths)))
        ids = _named(given, hosts.joined(self._contents))
        return Keys(ids, hosts.joined(self._prompts), hosts.joined(self._sizes))


def _named(given: Ragged, contents: np.ndarray) -> Ragged:
    """The ids; for the empty ones the content's hash, with a number from the second of the same content on."""
    missing = given.lengths == 0
    if not missing.any():
        return given
    copies = np.zeros(len(given), np.int64)
    copies[missing] = occurrence(contents[missing])
    ids, lengths = Column(np.uint8), Column(np.int32)
    for batch in batches(zip(given, contents, copies, strict=True), _BATCH):
        names = [
            name.tobytes() if not copy else (f"{content:016x}" + (f"#{copy}" if copy > 1 else "")).encode()
            for name, content, copy in batch
        ]
        ids.append(np.frombuffer(b"".join(names), np.uint8))
        lengths.append([len(name) for name in names])
    return Ragged(ids.array(), starts_of(lengths.array()))


def batches(
    items: Iterable[_Item], most: int, weight: Callable[[_Item], int] = lambda item: 1
) -> Iterator[list[_Item]]:
    """The items in lists that end as soon as they weigh `most`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += weight(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def location_of(records: Sequence[Record], row: int) -> str:
    return records.location(row) if isinstance(records, Records) else records[row].location


def ids_of(records: Sequence[Named]) -> Sequence[str]:
    return records.ids if isinstance(records, Records) else [r.id for r in records]


def responses_of(records: Sequence[Record]) -> np.ndarray:
    """The number of responses of each record, [n] int32."""
    return records.sizes if isinstance(records, Records) else np.array([len(r.responses) for r in records], np.int32)
