"""The pairs among the responses of records."""

from collections.abc import Sequence

import numpy as np

from activedpo_jax.data.digests import digests_of, first_repeat
from activedpo_jax.data.groups import group_pairs
from activedpo_jax.data.preferences import Record, uniform
from activedpo_jax.data.ragged import Lazy
from activedpo_jax.data.records import ids_of, location_of, responses_of
from activedpo_jax.data.sources import fail


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
