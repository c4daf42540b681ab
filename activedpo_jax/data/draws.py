"""Which records of a data set a run takes, drawn by its seed."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from activedpo_jax.data.fields import Prompt
from activedpo_jax.data.preferences import Record, prompt_hash, prompt_key, uniform
from activedpo_jax.data.records import Records, ids_of, location_of, responses_of


class HasPrompt(Protocol):
    @property
    def prompt(self) -> Prompt: ...


_Several = TypeVar("_Several", bound=Sequence[HasPrompt])
_Pairs = TypeVar("_Pairs", bound=Sequence[Record])


def split_by_prompt(records: _Several, fraction: float, seed: int) -> tuple[_Several, _Several]:
    """Training and held-out records, each in the given order, with no prompt on both sides.

    Args:
      fraction: share of the different prompts to hold out, rounded; each side gets at least one prompt.

    Raises:
      ValueError: there are fewer than two different prompts.
    """
    hashes, first, prompt_of = np.unique(_prompt_hashes(records), return_index=True, return_inverse=True)
    if len(hashes) < 2:
        raise ValueError(
            f"cannot hold out prompts: all {len(records)} records have the same one; "
            "expected two different prompts or more: add data, name a held-out set in config.data.heldout, or for "
            "SFT set config.sft.heldout_fraction=0"
        )
    # The draws need the prompts themselves, each of them once.
    ascending = np.argsort(first)
    draws = np.empty(len(hashes))
    examples = _taken(records, first[ascending])
    draws[ascending] = np.fromiter((uniform(seed, "split", prompt_key(r.prompt)) for r in examples), float, len(hashes))
    count = min(max(round(fraction * len(hashes)), 1), len(hashes) - 1)
    held_out = np.zeros(len(hashes), bool)
    held_out[np.argsort(draws, kind="stable")[:count]] = True
    there = held_out[prompt_of]
    return _taken(records, np.flatnonzero(~there)), _taken(records, np.flatnonzero(there))


def limit(records: _Pairs, num_pairs: int, seed: int) -> _Pairs:
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
    return _taken(records, np.sort(order[:count]))


def _prompt_hashes(records: Sequence[HasPrompt]) -> np.ndarray:
    """`prompt_hash` of each record, [n] uint64."""
    if isinstance(records, Records):
        return records.prompts
    return np.array([prompt_hash(r.prompt) for r in records], np.uint64)


def _taken(records: _Several, rows: np.ndarray) -> _Several:
    """The records in these ascending places [k]."""
    found: Any = records.taken(rows) if isinstance(records, Records) else [records[row] for row in rows.tolist()]
    return cast(_Several, found)
