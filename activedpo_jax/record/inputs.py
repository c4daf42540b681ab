"""What a command began with, compared with what it finds when it resumes.

    DIR/inputs/<name>.json    for every data set: each pair's id and a digest of its tokens and label, in order; for
                              the model and the adapter: a fingerprint of their files, or the Hub's commit

State that names pairs is valid only for the data it was made from, so a change is refused; the error says what changed.
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.groups import PairPool, Texts
from activedpo_jax.files import plain, read_json, write_json
from activedpo_jax.hosts import on_first

Inputs = Mapping[str, Any]


def describe_pool(pool: PairPool, source: str) -> Inputs:
    """Each pair's id, and a digest of its tokens as shown and of its label and rewards in the data."""
    rewards = [None] * pool.num_pairs if pool.rewards is None else pool.rewards
    digests = []
    for (group, *shown), preference, reward in zip(pool.pairs, pool.preferences, rewards, strict=True):
        tokens = [pool.prompt_tokens[group], *(pool.response_tokens[group][i] for i in shown)]
        digests.append(_digest(tokens, f"{preference} {None if reward is None else np.asarray(reward).tolist()}"))
    return {"source": source, "ids": list(pool.pair_ids), "digests": digests}


def describe_texts(texts: Texts, source: str) -> Inputs:
    """Each group's index and a digest of its tokens."""
    digests = [_digest([p, *r], "") for p, r in zip(texts.prompt_tokens, texts.response_tokens, strict=True)]
    return {"source": source, "ids": [str(i) for i in range(len(digests))], "digests": digests}


def _digest(arrays: Sequence[np.ndarray], label: str) -> str:
    state = hashlib.blake2b(label.encode(), digest_size=8)
    for array in arrays:
        state.update(len(array).to_bytes(4, "little") + np.asarray(array, np.int32).tobytes())
    return state.hexdigest()


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
    old, new = (dict(zip(x["ids"], x["digests"], strict=True)) for x in (before, now))
    shared = [name for name in before["ids"] if name in new]
    counts = {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "with other text, tokens or label": sum(old[name] != new[name] for name in shared),
    }
    words = [f"{count} {change}" for change, count in counts.items() if count]
    if shared != [name for name in now["ids"] if name in old]:
        words.append("in another order")
    return (
        f"{now['source']} had {len(old)} records, now {len(new)}: {', '.join(words) or 'read from ' + before['source']}"
    )
