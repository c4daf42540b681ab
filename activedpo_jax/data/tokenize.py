"""From records to token ids: texts to learn from, and the pool of pairs that everything downstream works on.

Records are read, templated and tokenised in batches of bounded size, and only tokens, lengths and counts are kept.
Several hosts take a share of the records each and exchange the results, so that each has the whole.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from activedpo_jax.data.encoding import Encoding, encode
from activedpo_jax.data.groups import PairPool, Texts
from activedpo_jax.data.notes import copies_note, notes
from activedpo_jax.data.pairs import shown_pairs
from activedpo_jax.data.preferences import Record, copy_hash
from activedpo_jax.data.ragged import Lazy, Nested, Ragged, starts_of
from activedpo_jax.data.records import batches
from activedpo_jax.data.store import ALONE, Column, Hosts
from activedpo_jax.data.tally import Tally
from activedpo_jax.data.templates import Exchange

_BATCH, _OVERHEAD = 1_000_000, 1000  # characters in a batch; what a record counts beside its own


def encoded_texts(records: Sequence[Exchange], encoding: Encoding, hosts: Hosts = ALONE) -> Texts:
    """One group per record, in order.

    Raises:
      ValueError: the template does not suit a prompt; a prompt has no tokens.
    """
    share = hosts.share(len(records))
    tokens = hosts.together(lambda: _Tokens(encoding, records[share.start : share.stop]))
    prompts, responses = tokens.joined(hosts)
    return Texts(prompt_tokens=prompts, response_tokens=responses, notes=notes(tokens.tally.joined(hosts), encoding))


def encoded_pool(records: Sequence[Record], encoding: Encoding, seed: int, hosts: Hosts = ALONE) -> PairPool:
    """`encoded_texts`, and all pairs of a record's responses in the order of `group_pairs`.

    Which response is shown first depends on the seed and the pair's id alone.

    Raises:
      ValueError: see `encoded_texts`; or two pairs have the same id.
    """
    pairs, pair_ids = shown_pairs(records, seed)
    share = hosts.share(len(records))
    part = hosts.together(lambda: _PoolPart(encoding, records, pairs, share))
    prompts, responses = part.tokens.joined(hosts)
    prompt_texts, response_texts = part.shown.joined(hosts)
    preferences, rewards = hosts.joined(part.preferences), hosts.joined(part.rewards).reshape(-1, 2)
    copies = copies_note(hosts.joined(part.copies), hosts.joined(part.sides))
    return PairPool(
        prompt_tokens=prompts,
        response_tokens=responses,
        pairs=pairs,
        pair_ids=pair_ids,
        preferences=preferences,
        rewards=None if np.all(np.isnan(rewards)) else rewards,
        prompt_texts=prompt_texts,
        response_texts=response_texts,
        notes=notes(part.tokens.tally.joined(hosts), encoding, len(pairs), copies),
    )


def shown_texts(records: Sequence[Exchange]) -> tuple[Sequence[Any], Sequence[Sequence[str]]]:
    """What a person reads of each record: the prompts, and the responses to each."""
    shown = _Shown()
    for batch in batches(records, _BATCH, characters):
        shown.add(batch)
    return shown.joined(ALONE)


class _Shown:
    """The texts of some records."""

    def __init__(self) -> None:
        self._texts, self._lengths = Column(np.uint8), Column(np.int32)

    def add(self, records: Sequence[Exchange]) -> None:
        texts = [json.dumps([r.prompt, *r.responses], ensure_ascii=False).encode() for r in records]
        self._texts.append(np.frombuffer(b"".join(texts), np.uint8))
        self._lengths.append([len(text) for text in texts])

    def joined(self, hosts: Hosts) -> tuple[Sequence[Any], Sequence[Sequence[str]]]:
        """The prompts and the responses of all hosts."""
        texts = Ragged(hosts.joined(self._texts), starts_of(hosts.joined(self._lengths)))
        return (
            Lazy(len(texts), lambda group: json.loads(texts[group].tobytes())[0]),
            Lazy(len(texts), lambda group: tuple(json.loads(texts[group].tobytes())[1:])),
        )


class _Tokens:
    """The tokens of some records, and what happened to them."""

    def __init__(self, encoding: Encoding, records: Iterable[Exchange] = ()) -> None:
        self._encoding = encoding
        self._prompts, self._responses = Column(np.int32), Column(np.int32)
        self._prompt_lengths, self._response_lengths, self._sizes = (Column(np.int32) for _ in range(3))
        self.tally = Tally()
        for batch in batches(records, _BATCH, characters):
            self.add(batch)

    def add(self, records: Sequence[Exchange]) -> list[list[np.ndarray]]:
        """Adds a batch; returns the tokens of its responses."""
        prompts, responses, tally = encode(records, self._encoding)
        self.tally.add(tally)
        flat = [r for several in responses for r in several]
        self._prompts.append(np.concatenate(prompts))
        self._prompt_lengths.append([len(p) for p in prompts])
        self._responses.append(np.concatenate([np.zeros(0, np.int32), *flat]))
        self._response_lengths.append([len(r) for r in flat])
        self._sizes.append([len(several) for several in responses])
        return responses

    def joined(self, hosts: Hosts) -> tuple[Ragged, Nested]:
        """The prompts and the responses of all hosts."""
        prompts = Ragged(hosts.joined(self._prompts), starts_of(hosts.joined(self._prompt_lengths)))
        responses = Ragged(hosts.joined(self._responses), starts_of(hosts.joined(self._response_lengths)))
        return prompts, Nested(responses, starts_of(hosts.joined(self._sizes)))


class _PoolPart:
    """The part of a pool that comes from a range of the records."""

    def __init__(self, encoding: Encoding, records: Sequence[Record], pairs: np.ndarray, share: range) -> None:
        self.tokens = _Tokens(encoding)
        self.shown = _Shown()
        self.preferences, self.rewards = Column(np.int8), Column(np.float32)
        self.copies, self.sides = Column(np.uint64), Column(np.int8)
        start = share.start
        for batch in batches(records[share.start : share.stop], _BATCH, characters):
            first, last = np.searchsorted(pairs[:, 0], [start, start + len(batch)])
            self._add(batch, pairs[first:last] - np.array([start, 0, 0], np.int32))
            start += len(batch)

    def _add(self, records: Sequence[Record], pairs: np.ndarray) -> None:
        responses, tally = self.tokens.add(records), self.tokens.tally
        self.shown.add(records)
        preferences, rewards, copies = [], [], []
        for g, first, second in pairs.tolist():
            record, given = records[g], records[g].rewards
            preferences.append(-1 if record.preferred is None else int(record.preferred == second))
            rewards.append((given[first], given[second]) if given else (np.nan, np.nan))
            copies.append(copy_hash(record, (first, second)))
            tally.same += np.array_equal(responses[g][first], responses[g][second])
            tally.ties += record.preferred is None and given is not None and given[first] == given[second]
        self.preferences.append(preferences)
        self.rewards.append(rewards)
        self.copies.append([content for content, _ in copies])
        self.sides.append([side for _, side in copies])


def characters(record: Exchange) -> int:
    prompt = record.prompt if isinstance(record.prompt, str) else "".join(m["content"] for m in record.prompt)
    return _OVERHEAD + len(prompt) + sum(map(len, record.responses))
