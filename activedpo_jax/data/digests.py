"""Digests of names: what a million names are compared by, since the names themselves would fill the memory."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def digests_of(names: Iterable[str]) -> np.ndarray:
    """128 bits of each name: [N, 4] uint32."""
    return digests_of_bytes(name.encode() for name in names)


def digests_of_bytes(contents: Iterable[bytes]) -> np.ndarray:
    """128 bits of each content: [N, 4] uint32."""
    digests = bytearray()
    for content in contents:
        digests += hashlib.blake2b(content, digest_size=16).digest()
    return np.frombuffer(digests, "<u4").reshape(-1, 4).astype(np.uint32)


def first_repeat(digests: np.ndarray) -> tuple[int, int] | None:
    """The first row [N, 4] that is equal to an earlier one, and the earliest such; None: all differ."""
    order = np.lexsort(digests.T)  # keeps the order of equal rows
    same = np.all(digests[order[1:]] == digests[order[:-1]], axis=1)
    if not same.any():
        return None
    row = int(order[1:][same].min())
    return row, int(np.all(digests[:row] == digests[row], axis=1).argmax())


def rows_of(names: Sequence[str], digests: np.ndarray) -> np.ndarray:
    """The row of each name among the digests [N, 4] of different names, [K] int64.

    Raises:
      KeyError: a name is not among them.
    """
    wanted, known = (np.ascontiguousarray(x).view(np.uint64) for x in (digests_of(names), digests))
    order = np.lexsort((known[:, 1], known[:, 0]))
    first = np.searchsorted(known[order, 0], wanted[:, 0])
    last = np.searchsorted(known[order, 0], wanted[:, 0], side="right")
    rows = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        candidates = order[first[i] : last[i]]  # more than one only where 64 bits agree by chance
        found = candidates[known[candidates, 1] == wanted[i, 1]]
        if not len(found):
            raise KeyError(name)
        rows[i] = found[0]
    return rows


def occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value [n] has occurred up to its place, itself included: [n] int64."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(values) else order
    counts = np.empty(len(values), np.int64)
    run = np.repeat(begins, np.diff(np.append(begins, len(values))))
    counts[order] = np.arange(len(values)) - run + 1
    return counts
