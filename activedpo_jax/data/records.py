"""The records of a data set: read, named, drawn from, split, and paired, without holding them.

Of a record that lies in a file its keys alone are in memory: its id, and a few numbers.  The record itself is read when
it is asked for.  Records that were passed in are a plain list, and everything here takes either.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, overload

import numpy as np

from activedpo_jax.data.digests import digests_of, first_repeat, occurrence
from activedpo_jax.data.fields import Prompt
from activedpo_jax.data.groups import group_pairs
from activedpo_jax.data.preferences import Record, content_hash, parse_record, prompt_hash, prompt_key, uniform
from activedpo_jax.data.ragged import Lazy, Ragged, Strings, starts_of
from activedpo_jax.data.sources import Rows, fail, open_rows
from activedpo_jax.data.store import ALONE, Column, Hosts

_BATCH = 1000  # records


class HasPrompt(Protocol):
    @property
    def prompt(self) -> Prompt: ...


_Record = TypeVar("_Record", bound=HasPrompt)
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Keys:
    """What is known of every record of a data set without reading it again."""

    ids: Ragged  # UTF-8
    prompts: np.ndarray  # [n] uint64, of `prompt_hash`
    sizes: np.ndarray  # [n] int32, responses


class Records(Sequence[Record]):
    """Some of the records of a data set, read one by one when they are asked for.

    Args:
      chosen: [n] int64, ascending rows.
    """

    def __init__(self, rows: Rows, keys: Keys, chosen: np.ndarray) -> None:
        self._rows, self._keys, self._chosen = rows, keys, chosen
        self._names = Strings(keys.ids)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> "Records": ...
    def __getitem__(self, row: int | slice) -> "Record | Records":
        if isinstance(row, slice):
            return self.taken(np.arange(*row.indices(len(self))))
        return next(iter(self.taken(np.arange(len(self))[[row]])))

    def __iter__(self) -> Iterator[Record]:
        for row, fields in zip(self._chosen.tolist(), self._rows.read(self._chosen), strict=True):
            record = parse_record(fields, self._rows.location(row))
            yield record if record.id else dataclasses.replace(record, id=self._names[row])

    def taken(self, rows: np.ndarray) -> "Records":
        """Those in ascending places [k] of these."""
        return Records(self._rows, self._keys, self._chosen[rows])

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


def read_records(source: str, split: str = "train", hosts: Hosts = ALONE) -> Records:
    """All records of a data set, in order.  Each is read and checked once; what is kept are the keys.

    Args:
      source: a `.jsonl` or `.parquet` file, or a directory or name for `datasets`.
      split: of a `datasets` directory or name; a file is one split.
      hosts: each reads its share, and all get the keys of all.

    Raises:
      ValueError: the source cannot be read, a record is malformed, or an id is there twice; says which line (from 1)
        or row (from 0), what was expected, and what to change.  Nothing is dropped or repaired.
    """
    rows = hosts.together(lambda: open_rows(source, split))
    hosts.agree(f"the number of records of {source}", str(len(rows)))
    if not len(rows):
        raise ValueError(f"{source}: there is no record in it; expected one at least: check config.data")
    share = hosts.share(len(rows))

    def parsed() -> Iterator[Record]:
        for row, fields in zip(share, rows.read(share), strict=True):
            yield parse_record(fields, rows.location(row))

    found = hosts.together(lambda: _Found(parsed()))
    return Records(rows, found.keys(hosts, rows.location), np.arange(len(rows)))


def named_records(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Record]:
    """The records of rows, each given with its location; a record without an id gets a hash of its content.

    Raises:
      ValueError: a record is malformed, or an id is there twice.
    """
    records = [parse_record(row, location) for location, row in rows]
    names = Strings(_Found(records).keys(ALONE, lambda row: records[row].location).ids)
    return [r if r.id else dataclasses.replace(r, id=name) for r, name in zip(records, names, strict=True)]


class _Found:
    """The keys of records as they are read; an id is empty where the data gives none."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.ids, self.id_lengths, self.sizes = Column(np.uint8), Column(np.int32), Column(np.int32)
        self.contents, self.prompts = Column(np.uint64), Column(np.uint64)
        for batch in batches(records, _BATCH):
            names = [r.id.encode() for r in batch]
            self.ids.append(np.frombuffer(b"".join(names), np.uint8))
            self.id_lengths.append([len(name) for name in names])
            self.sizes.append([len(r.responses) for r in batch])
            self.contents.append([0 if r.id else content_hash(r) for r in batch])
            self.prompts.append([prompt_hash(r.prompt) for r in batch])

    def keys(self, hosts: Hosts, location: Any) -> Keys:
        """Those of all hosts.

        Args:
          location: of a row, for error messages.

        Raises:
          ValueError: an id is there twice.
        """
        given = Ragged(hosts.joined(self.ids), starts_of(hosts.joined(self.id_lengths)))
        ids = _named(given, hosts.joined(self.contents))
        names = Strings(ids)
        if repeat := first_repeat(digests_of(names)):
            row, earlier = repeat
            problem = f"id {names[row]!r} was given to {location(earlier)} already"
            fail(location(row), problem, "every id once")
        return Keys(ids, hosts.joined(self.prompts), hosts.joined(self.sizes))


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


def ids_of(records: Sequence[Record]) -> Sequence[str]:
    return records.ids if isinstance(records, Records) else [r.id for r in records]


def responses_of(records: Sequence[Record]) -> np.ndarray:
    """The number of responses of each record, [n]."""
    return records.sizes if isinstance(records, Records) else np.array([len(r.responses) for r in records], np.int32)


def prompt_hashes_of(records: Sequence[HasPrompt]) -> np.ndarray:
    """`prompt_hash` of each record, [n] uint64."""
    if isinstance(records, Records):
        return records.prompts
    return np.array([prompt_hash(r.prompt) for r in records], np.uint64)


def taken(records: Sequence[_Record], rows: np.ndarray) -> Sequence[_Record]:
    """The records in these ascending places [k]."""
    if isinstance(records, Records):
        return cast(Sequence[_Record], records.taken(rows))
    return [records[row] for row in rows.tolist()]


def shown_pairs(records: Sequence[Record], seed: int) -> tuple[np.ndarray, Sequence[str]]:
    """All pairs of every record's responses: (record, response shown first, response shown second), and their ids.

    Which of the two is shown first depends on the seed and the pair's id alone.

    Returns:
      [N, 3] int32, record by record, each in the order of `group_pairs`; N names.

    Raises:
      ValueError: two pairs have the same id.
    """
    names, sizes = ids_of(records), responses_of(records)
    counts = sizes * (sizes - 1) // 2
    pairs = np.empty((int(counts.sum()), 3), np.int32)
    pairs[:, 0] = np.repeat(np.arange(len(sizes)), counts)
    sizes_there = sizes[pairs[:, 0]]
    for m in np.unique(sizes):
        pairs[sizes_there == m, 1:] = np.tile(group_pairs(m), (int((sizes == m).sum()), 1))

    def name(row: int) -> str:
        group, *shown = pairs[row].tolist()
        return names[group] if sizes[group] == 2 else f"{names[group]}/{min(shown)}-{max(shown)}"

    pair_ids = Lazy(len(pairs), name) if sizes.max() > 2 else names
    if repeat := first_repeat(digests_of(pair_ids)):
        place, before = (location_of(records, int(pairs[row, 0])) for row in repeat)
        problem = f"the pair id {pair_ids[repeat[0]]!r} is that of a pair of {before} already"
        fail(place, problem, "every pair id once", "change the `id` of one of the records")
    swapped = np.fromiter((uniform(seed, "side", pair) >= 0.5 for pair in pair_ids), bool, len(pairs))
    pairs[swapped, 1:] = pairs[swapped, :0:-1]
    return pairs, pair_ids


def split_by_prompt(
    records: Sequence[_Record], fraction: float, seed: int
) -> tuple[Sequence[_Record], Sequence[_Record]]:
    """Training and held-out records, each in the given order, with no prompt on both sides.

    Args:
      fraction: share of the different prompts to hold out, rounded; each side gets at least one prompt.

    Raises:
      ValueError: there are fewer than two different prompts.
    """
    hashes, first, prompt_of = np.unique(prompt_hashes_of(records), return_index=True, return_inverse=True)
    if len(hashes) < 2:
        raise ValueError(
            f"cannot hold out prompts: all {len(records)} records have the same one; "
            "expected two different prompts or more: add data, name a held-out set in config.data.heldout, or for "
            "SFT set config.sft.heldout_fraction=0"
        )
    # The draws need the prompts themselves, each of them once.
    ascending = np.argsort(first)
    draws = np.empty(len(hashes))
    examples = taken(records, first[ascending])
    draws[ascending] = np.fromiter((uniform(seed, "split", prompt_key(r.prompt)) for r in examples), float, len(hashes))
    count = min(max(round(fraction * len(hashes)), 1), len(hashes) - 1)
    held_out = np.zeros(len(hashes), bool)
    held_out[np.argsort(draws, kind="stable")[:count]] = True
    there = held_out[prompt_of]
    return taken(records, np.flatnonzero(~there)), taken(records, np.flatnonzero(there))


def limit(records: Sequence[Record], num_pairs: int, seed: int) -> Sequence[Record]:
    """Records drawn by the seed that have at most `num_pairs` pairs between them, in the given order.

    What a lower limit draws is part of what a higher one draws.

    Raises:
      ValueError: the first record drawn alone has more pairs than that.
    """
    draws = np.fromiter((uniform(seed, "limit", name) for name in ids_of(records)), float, len(records))
    order = np.argsort(draws, kind="stable")
    sizes = responses_of(records)[order].astype(np.int64)
    count = int(np.searchsorted(np.cumsum(sizes * (sizes - 1) // 2), num_pairs, side="right"))
    if not count:
        place, pairs = location_of(records, int(order[0])), math.comb(int(sizes[0]), 2)
        raise ValueError(
            f"a limit of {num_pairs} pairs leaves nothing: {place} alone has {pairs}; "
            "raise config.data.train_limit or heldout_limit"
        )
    return taken(records, np.sort(order[:count]))
