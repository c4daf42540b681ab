"""What a command began with, compared with what it finds when it resumes.

    DIR/inputs/<name>.json    for every data set: digests of each pair's id and of its tokens and label, in order, 8
                              bytes each in base64; for the model and the adapter: a fingerprint of their files, or the
                              Hub's commit

State that names pairs is valid only for the data it was made from, so a change is refused; the error says what changed.
"""

import base64
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.digests import digests_of
from activedpo_jax.data.groups import PairPool, Texts
from activedpo_jax.data.ragged import Lazy
from activedpo_jax.files import plain, read_json, write_json
from activedpo_jax.hosts import on_first

Inputs = Mapping[str, Any]

_BLOCK = 1 << 12  # pairs


def describe_pool(pool: PairPool, source: str) -> Inputs:
    """Each pair's id, and a digest of its tokens as shown and of its label and rewards in the data."""
    rewards = np.full((pool.num_pairs, 2), np.nan, np.float32) if pool.rewards is None else pool.rewards
    contents = bytearray()
    for rows in _blocks(pool.num_pairs):
        labels = zip(pool.preferences[rows].tolist(), rewards[rows], strict=True)
        for (group, *shown), (preference, reward) in zip(pool.pairs[rows].tolist(), labels, strict=True):
            responses = pool.response_tokens[group]
            tokens = [pool.prompt_tokens[group], *(responses[i] for i in shown)]
            contents += _digest(tokens, b"%d " % preference + reward.tobytes())
    return describe_records(pool.pair_ids, contents, source)


def describe_texts(texts: Texts, source: str) -> Inputs:
    """Each group's index and a digest of its tokens."""
    contents = bytearray()
    for prompt, responses in zip(texts.prompt_tokens, texts.response_tokens, strict=True):
        contents += _digest([prompt, *responses], b"")
    return describe_records(Lazy(texts.num_groups, str), contents, source)


def describe_records(names: Sequence[str], contents: bytes | bytearray, source: str) -> Inputs:
    """Records by their names, which differ, and 8 bytes for the content of each; 16 bytes of each record are kept."""
    records = np.empty((len(names), 2), "<u8")
    records[:, 0] = digests_of(names)[:, :2].copy().view(np.uint64)[:, 0]
    records[:, 1] = np.frombuffer(contents, "<u8")
    return {"source": source, "records": len(names), "digests": base64.b64encode(records.tobytes()).decode()}


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK) for first in range(0, count, _BLOCK))


def _digest(arrays: Sequence[np.ndarray], label: bytes) -> bytes:
    state = hashlib.blake2b(label, digest_size=8)
    for array in arrays:
        state.update(len(array).to_bytes(4, "little"))
        state.update(np.ascontiguousarray(array, np.int32).data)
    return state.digest()


@on_first
def hold(path: pathlib.Path, now: Mapping[str, Inputs | str]) -> None:
    """Records what a new command begins with, or refuses to resume an old one that began with something else.

    Args:
      now: by name (`pool`, `model`, ...): data sets as described by `describe_pool`, fingerprints as strings.

    Raises:
      ValueError: see `check`.
    """
    check(path, now)
    if not path.exists():
        write_json(path, now)


@on_first
def check(path: pathlib.Path, now: Mapping[str, Inputs | str]) -> None:
    """Compares with what was recorded, if anything was.

    Raises:
      ValueError: says what has changed, and how.
    """
    if not path.exists():
        return
    before, current = read_json(path), plain(now)
    differences = [
        f"{name}: {_difference(before.get(name), current.get(name))}"
        for name in current | before
        if before.get(name) != current.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path.parents[1]}: this work directory began with other inputs: {'; '.join(differences)}; "
            "to resume it restore them, for a new run give another --workdir"
        )


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"its files have changed (fingerprint was {before}, now {now})"
    if "digests" not in before or not isinstance(before["digests"], str):
        return "what it began with was recorded by another version of this program, and cannot be compared"
    (old, was), (new, content) = (_records(x) for x in (before, now))
    shared, there, here = np.intersect1d(old, new, assume_unique=True, return_indices=True)
    counts = {
        "added": len(new) - len(shared),
        "removed": len(old) - len(shared),
        "with other text, tokens or label": int(np.sum(was[there] != content[here])),
    }
    words = [f"{count} {change}" for change, count in counts.items() if count]
    if not np.array_equal(old[np.sort(there)], new[np.sort(here)]):
        words.append("in another order")
    return (
        f"{now['source']} had {len(old)} records, now {len(new)}: {', '.join(words) or 'read from ' + before['source']}"
    )


def _records(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The names and the contents of the records, [n] uint64 each."""
    found = np.frombuffer(base64.b64decode(inputs["digests"]), "<u8").reshape(-1, 2)
    return found[:, 0], found[:, 1]
