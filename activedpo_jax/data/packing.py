"""Which texts go through a model together when they lie end to end on one axis, and the static shape of that.

Padding costs as much as text, and every shape has a compiled program of its own.  So there is one shape for a whole
pass: its batches are made equal, each with as many long texts, and as many tokens, as any other, and the shape is what
they turn out to need.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from activedpo_jax.data.groups import Texts
from activedpo_jax.data.ragged import lengths_each, lengths_of

# What the tokens of an axis and the widths of its tiers are multiples of: on TPUs, of the attention kernel's blocks.
_MULTIPLE = {"tpu": 128, "cpu": 16}
_OTHERS = 64

_TIERS = 4  # at most: each has an attention of its own to compile, and saves less than the one before
_OPEN = 8  # batches that are looked at for room
_DRAWS, _MOST = 256, 0.9  # minibatches that are drawn to find their usual shape, and the share that shall fit it
_BLOCK = 64  # batches that are made equal among each other, which takes time with the square of it


class Tier(NamedTuple):
    """Texts that are padded to one width where they have to be told apart."""

    texts: int
    width: int  # tokens


class Axis(NamedTuple):
    """The texts of a batch on one axis."""

    tokens: int  # that they have at most together
    tiers: tuple[Tier, ...]  # from the longest texts to the shortest: what each of them has at most

    def times(self, m: int) -> "Axis":
        """Of m batches together."""
        return Axis(m * self.tokens, tuple(Tier(m * count, width) for count, width in self.tiers))

    @property
    def widths(self) -> np.ndarray:
        """What each text has at most, from the longest to the shortest: [texts] int64."""
        return np.repeat([width for _, width in self.tiers], [count for count, _ in self.tiers])

    def holds(self, lengths: np.ndarray) -> np.ndarray:
        """Whether it holds texts of these lengths, [..., n] for at most as many as it has: [...] bool."""
        longest_first = -np.sort(-lengths, axis=-1)
        fits = longest_first <= self.widths[: lengths.shape[-1]]
        return np.all(fits, axis=-1) & (lengths.sum(axis=-1) <= self.tokens)


class Packing(NamedTuple):
    """The static shape of a packed batch of groups of m responses."""

    prompts: Axis
    responses: Axis  # of one response of each group; m of them take m times as much

    @property
    def groups(self) -> int:
        """The number of groups of a batch."""
        return sum(count for count, _ in self.prompts.tiers)

    def tokens(self, m: int) -> int:
        """What a model computes of a batch."""
        return self.prompts.tokens + m * self.responses.tokens


class Lengths(NamedTuple):
    """What packing has to know of n groups."""

    prompts: np.ndarray  # [n] int64
    responses: np.ndarray  # [n, m] int64, 0: there is none

    @property
    def text(self) -> np.ndarray:
        """The tokens of each group, [n] int64."""
        return self.prompts + self.responses.sum(axis=1)

    def of(self, rows: np.ndarray) -> "Lengths":
        return Lengths(self.prompts[rows], self.responses[rows])


def multiple_on(platform: str) -> int:
    """Of what numbers of tokens packings are made on a platform."""
    return _MULTIPLE.get(platform, _OTHERS)


def lengths_in(texts: Texts) -> Lengths:
    return Lengths(lengths_of(texts.prompt_tokens), lengths_each(texts.response_tokens, texts.responses_per_group))


def in_turn(lengths: Any, numpy: Any = np) -> Any:
    """The responses of each group, longest first in every second, shortest first in the others: [..., G, m] of lengths
    → the order.  So the first of all groups have about as many tokens as the second.

    Args:
      numpy: or `jax.numpy`, for the device that has to know what the host has planned for.
    """
    sign = numpy.where(numpy.arange(lengths.shape[-2]) % 2, 1, -1)[:, None]
    return numpy.argsort(sign * lengths, axis=-1, stable=True)


def plan(lengths: Lengths, size: int, multiple: int, together: bool) -> tuple[list[np.ndarray], Packing]:
    """All groups in batches of at most `size`, which differ as little as can be, and a packing that holds each.

    Args:
      multiple: of the tokens of an axis, and of the widths of its tiers.
      together: all responses of a batch are computed at once; else one of each group at a time, in the order of
        `in_turn`.

    Returns:
      The rows of each batch, and the packing.
    """
    count = len(lengths.prompts)
    number = -(-count // size)
    longest = lengths.responses.max(axis=1)
    order = np.lexsort((np.arange(count), -lengths.prompts, -longest))
    batches = [rows for block in _blocks(number) for rows in _equal(lengths, order, block, number)]
    slots = np.full((number, size), -1)
    for i, rows in enumerate(batches):
        slots[i, : len(rows)] = rows
    there = slots >= 0
    prompts = np.where(there, lengths.prompts[slots], 1)  # as a group that makes up a batch has
    responses = np.where(there[..., None], lengths.responses[slots], 0)
    return batches, _packing(prompts, responses, multiple, together)


def fill(lengths: Lengths, packing: Packing, together: bool) -> list[np.ndarray]:
    """Groups in batches that a given packing holds, the longest first, each into the first batch with room for it.

    Args:
      together: as in `plan`.

    Returns:
      The rows of each batch.

    Raises:
      ValueError: a group on its own does not fit.
    """
    batches: list[list[int]] = []
    for row in np.argsort(-lengths.text, kind="stable").tolist():
        for batch in batches[-_OPEN:]:
            if holds(packing, lengths.of(np.array([*batch, row])), together):
                batch.append(row)
                break
        else:
            if not holds(packing, lengths.of(np.array([row])), together):
                prompt, responses = lengths.prompts[row], lengths.responses[row].tolist()
                raise ValueError(
                    f"a prompt of {prompt} and responses of {responses} tokens do not fit a batch of {packing}: it "
                    "was made for texts that are shorter"
                )
            batches.append([row])
    return [np.array(batch) for batch in batches]


def holds(packing: Packing, lengths: Lengths, together: bool) -> bool:
    """Whether these groups fit into one batch, in this order."""
    count, m = lengths.responses.shape
    if count > packing.groups:
        return False
    prompts = np.concatenate([lengths.prompts, np.ones(packing.groups - count, int)])  # empty groups make up a batch
    if together:
        return bool(packing.prompts.holds(prompts) and packing.responses.times(m).holds(lengths.responses.reshape(-1)))
    turned = np.take_along_axis(lengths.responses, in_turn(lengths.responses), axis=-1)
    return bool(packing.prompts.holds(prompts) and np.all(packing.responses.holds(turned.T)))


def packings(lengths: Lengths, sizes: Sequence[int], multiple: int) -> tuple[Packing, ...]:
    """Shapes for random minibatches of these groups, one for each of some sizes: most minibatches of that size fit,
    and any single group does."""
    rng = np.random.default_rng(0)
    count = len(lengths.prompts)
    longest = [int(lengths.prompts.max()), int(lengths.responses.max())]

    def axis(drawn: np.ndarray, most: int, empty: int) -> Axis:
        """Of texts [draws, size, m], the longest of all, and what a group that makes up a batch has."""
        m = drawn.shape[-1]
        total, by_rank = drawn.sum(axis=(1, 2)), np.sort(drawn.reshape(len(drawn), -1), axis=1)[:, ::-1]
        tokens, widths = np.quantile(total, _MOST) / m, np.quantile(by_rank[:, ::m], _MOST, axis=0)
        widths[0] = most
        least = most + (size - 1) * empty
        return Axis(_up(math.ceil(max(tokens, least)), multiple), _tiers(widths, multiple, 0))

    found = []
    for size in sizes:
        drawn = lengths.of(rng.integers(0, count, (_DRAWS, size)))
        found.append(Packing(axis(drawn.prompts[..., None], longest[0], 1), axis(drawn.responses, longest[1], 0)))
    return tuple(found)


class Batch(NamedTuple):
    """Groups that go through a model together."""

    rows: np.ndarray  # [≤ packing.groups] int64
    packing: Packing


def minibatch(lengths: Lengths, shapes: Sequence[Packing]) -> list[Batch]:
    """A minibatch of groups in batches of few tokens.

    Args:
      shapes: by rising size; any group fits any of them.
    """
    m = lengths.responses.shape[1]

    def least(rows: np.ndarray) -> Packing:
        fitting = [shape for shape in shapes if holds(shape, lengths.of(rows), together=True)]
        return min(fitting, key=lambda shape: shape.tokens(m))

    ways = [[Batch(rows, least(rows)) for rows in fill(lengths, shape, together=True)] for shape in shapes]
    return min(ways, key=lambda way: computed(way, m))


def computed(batches: Sequence[Batch], m: int) -> int:
    """The tokens that a model computes in these batches, padding included."""
    return sum(batch.packing.tokens(m) for batch in batches)


def useful_share(lengths: Lengths, batches: Sequence[np.ndarray], packing: Packing) -> float:
    """The share of the tokens that are computed in these batches that are text and not padding."""
    text = sum(int(lengths.text[rows].sum()) for rows in batches)
    return text / (len(batches) * packing.tokens(lengths.responses.shape[1]))


def _blocks(number: int) -> list[np.ndarray]:
    """Batches in blocks of at most `_BLOCK`, each with batches from all over."""
    blocks = -(-number // _BLOCK)
    return [np.arange(i, number, blocks) for i in range(blocks)]


def _equal(lengths: Lengths, order: np.ndarray, block: np.ndarray, number: int) -> list[np.ndarray]:
    """The batches of a block.  Of as many neighbours in `order` as there are batches each takes one, and the one that
    is fullest so far the least."""
    load = np.column_stack([lengths.prompts, lengths.responses.sum(axis=1)])
    load = load / np.maximum(load.mean(axis=0), 1)
    filled = np.zeros((len(block), load.shape[1]))
    batches: list[list[int]] = [[] for _ in block]
    for first in range(0, len(order), number):
        rows = order[first : first + number]
        rows = rows[block[block < len(rows)]]
        free = np.ones(len(block), bool)
        for row in rows[np.argsort(-load[rows].max(axis=1), kind="stable")]:
            after = np.where(free, ((filled + load[row]) ** 4).sum(axis=1), np.inf)
            batch = int(after.argmin())
            free[batch] = False
            filled[batch] += load[row]
            batches[batch].append(int(row))
    return [np.array(rows) for rows in batches]


def _packing(prompts: np.ndarray, responses: np.ndarray, multiple: int, together: bool) -> Packing:
    """What holds each of some batches of prompts [batches, G] and responses [batches, G, m]."""
    m = responses.shape[-1]
    turned = np.take_along_axis(responses, in_turn(responses), axis=-1)
    most = turned.sum(axis=1).max() if not together else -(-responses.sum(axis=(1, 2)).max() // m)
    slots = np.sort(turned, axis=1)[:, ::-1].max(axis=(0, 2))  # of the longest in any slot, the second longest, ...
    prompt_widths = np.sort(prompts, axis=1)[:, ::-1].max(axis=0)
    width = _up(int(prompt_widths[0]), multiple)
    return Packing(
        Axis(_up(int(prompts.sum(axis=1).max()), multiple), _tiers(prompt_widths, multiple, 0)),
        Axis(_up(int(most), multiple), _tiers(slots, multiple, width)),
    )


def _up(tokens: int, multiple: int) -> int:
    return max(multiple, -(-tokens // multiple) * multiple)


def _tiers(widths: np.ndarray, multiple: int, more: int) -> tuple[Tier, ...]:
    """At most `_TIERS`, for which attention computes the fewest scores.

    Args:
      widths: [n], from the longest text to the shortest.
      more: keys of every token, beside those of its own text.
    """
    rounded = [_up(int(w), multiple) for w in widths]
    cost = [w * (w + more) for w in rounded]
    count = len(rounded)
    least = [[0.0, *[math.inf] * count]]  # by the number of tiers, of the first i texts
    cuts: list[list[int]] = [[0] * (count + 1)]
    for _ in range(_TIERS):
        before, row, cut = least[-1], [math.inf] * (count + 1), [0] * (count + 1)
        row[0] = 0.0
        for end in range(1, count + 1):
            row[end], cut[end] = min((before[i] + (end - i) * cost[i], i) for i in range(end))
        least.append(row)
        cuts.append(cut)
    found, end, tiers = [], count, _TIERS
    while end:
        begin = cuts[tiers][end]
        found.append(Tier(end - begin, rounded[begin]))
        end, tiers = begin, tiers - 1
    merged: list[Tier] = []
    for tier in reversed(found):
        if merged and merged[-1].width == tier.width:
            merged[-1] = Tier(merged[-1].texts + tier.texts, tier.width)
        else:
            merged.append(tier)
    return tuple(merged)
