"""Which texts go through a model together, and padded to what.

Each padded shape has a compiled program of its own, so there are few: some buckets of (prompt, response) tokens, times
some numbers of examples.  Padding costs as much as text.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from activedpo_jax.data.groups import Bucket, Texts, assign_buckets
from activedpo_jax.data.ragged import lengths_of, longest_of, totals_of

# What a part costs at least, in tokens: with fewer, reading the weights takes most of the time.
_LEAST = 256


class Part(NamedTuple):
    """Examples that go through a model together."""

    bucket: int  # of a list of buckets, which holds all of them
    places: np.ndarray  # [n] int64, which examples of a batch they are
    size: int  # the number to which they are padded, at least n


def sizes(largest: int, multiple: int) -> tuple[int, ...]:
    """The sizes that the parts of a batch may have, in rising order: each about a quarter of the next.

    Args:
      largest: a multiple of `multiple`, the number of devices that a batch is cut over, as all sizes are.
    """
    found = [largest // multiple]
    while found[-1] > 1:
        found.append(next(found[-1] // n for n in (4, *range(2, found[-1] + 1)) if found[-1] % n == 0))
    return tuple(multiple * n for n in reversed(found))


def parts(bucket_of: np.ndarray, buckets: Sequence[Bucket], responses: int, sizes: Sequence[int]) -> list[Part]:
    """Cuts a batch into parts so that the fewest tokens are computed.

    A part is of one bucket, and takes what smaller ones leave over where that costs less than padding them to a size.

    Args:
      bucket_of: [n], the smallest bucket of each example; buckets: each holds what those before it hold.
      responses: of an example.
      sizes: that a part may be padded to, in rising order, each a divisor of the next.

    Returns:
      Parts by rising buckets, examples of a bucket in their order.
    """
    whole, rest = [], []
    for bucket in range(len(buckets)):
        places = np.flatnonzero(bucket_of == bucket)
        full = len(places) // sizes[-1] * sizes[-1]
        whole += [Part(bucket, p, sizes[-1]) for p in places[:full].reshape(-1, sizes[-1])]
        rest.append(places[full:])
    order = np.concatenate(rest)
    cost = [bucket.prompt + responses * bucket.response for bucket in buckets]
    # Of the examples that are left: the least tokens for the first i, and the size of the last part of these.  Buckets
    # are nested, so some best way cuts them in this order, each part but the first as full as its size allows.
    least, last = [0], [0]
    for i, bucket in enumerate(bucket_of[order].tolist(), start=1):
        tokens, size = min((least[max(0, i - s)] + max(s * cost[bucket], _LEAST), s) for s in sizes)
        least.append(tokens)
        last.append(size)
    found, end = [], len(order)
    while end:
        start = max(0, end - last[end])
        places = order[start:end]
        found.append(Part(int(bucket_of[places[-1]]), places, last[end]))
        end = start
    return sorted([*whole, *found[::-1]], key=lambda part: part.bucket)


def fitted(texts: Texts, buckets: Sequence[Bucket], most: int, multiple: int, worth: float) -> tuple[Bucket, ...]:
    """The buckets with others that save padding of these texts, added one by one, each where it saves most.

    Args:
      buckets: each holds what those before it hold, the last holds all texts.
      most: buckets to add.
      multiple: of both sizes of the new ones, in tokens.
      worth: tokens that a new one has to save.
    """
    m = texts.responses_per_group
    prompt, response = lengths_of(texts.prompt_tokens), longest_of(texts.response_tokens)
    prompts, responses = (np.append(np.arange(multiple, limit, multiple), limit) for limit in buckets[-1])
    cost = prompts[:, None] + m * responses
    held = np.zeros(cost.shape, np.int64)  # the number of texts that each possible bucket holds
    np.add.at(held, (np.searchsorted(prompts, prompt), np.searchsorted(responses, response)), 1)
    held = held.cumsum(0).cumsum(1)

    ladder = list(buckets)
    for _ in range(most):
        most_saved, best = worth, None
        for lower, upper in itertools.pairwise([Bucket(0, 0), *ladder]):
            # Between two neighbours, a new one takes from the upper what the lower does not hold.
            between = (prompts >= lower.prompt)[:, None] & (responses >= lower.response)
            between &= (prompts <= upper.prompt)[:, None] & (responses <= upper.response)
            below = np.sum((prompt <= lower.prompt) & (response <= lower.response))
            saved = np.where(between, (held - below) * (upper.prompt + m * upper.response - cost), 0)
            p, r = np.unravel_index(saved.argmax(), saved.shape)
            if saved[p, r] > most_saved:
                most_saved, best = int(saved[p, r]), Bucket(int(prompts[p]), int(responses[r]))
        if best is None:
            break
        ladder = sorted([*ladder, best])
    return tuple(ladder)


def computed(found: Sequence[Part], buckets: Sequence[Bucket], responses: int) -> int:
    """The tokens that a model computes in these parts, padding included."""
    return sum(part.size * (buckets[part.bucket].prompt + responses * buckets[part.bucket].response) for part in found)


def useful_share(texts: Texts, buckets: Sequence[Bucket], size: int) -> float:
    """The share of the tokens of a pass over some texts, `size` at a time, that are text and not padding."""
    m = texts.responses_per_group
    found = parts(assign_buckets(texts, buckets), buckets, m, (size,))
    tokens = lengths_of(texts.prompt_tokens).sum() + totals_of(texts.response_tokens).sum()
    return float(tokens / computed(found, buckets, m))
