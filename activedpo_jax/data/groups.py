"""Groups: the one layout that everything downstream shares, a prompt and its m responses, padded to a bucket.

A prompt is padded on the left, so that its last token, whose hidden state predicts the first token of every
response, has a fixed position; a response is padded on the right.  Masks come from the lengths alone: the
padding id may be any token, the end-of-sequence token included.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from activedpo_jax.data.digests import digests_of
from activedpo_jax.data.ragged import Nested, largest, lengths_of, longest_of, sizes_of

Array = jax.Array | np.ndarray[Any, Any]


class Groups(NamedTuple):
    """A batch of G prompts with m responses each; a pytree of int32 arrays."""

    prompt_ids: Array  # [G, P], padded on the left
    prompt_len: Array  # [G], at least 1
    response_ids: Array  # [G, m, R], padded on the right
    response_len: Array  # [G, m]; 0 marks a missing response


class Bucket(NamedTuple):
    """A padded shape; each has a compiled program of its own."""

    prompt: int  # P, tokens
    response: int  # R, tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Tokenised groups, in host memory.

    Every group has the same number m of response slots in a padded batch; a group with fewer responses leaves
    the last ones empty.
    """

    prompt_tokens: Sequence[np.ndarray]  # per group: int32 [length]
    response_tokens: Sequence[Sequence[np.ndarray]]  # per group: 1 to m arrays of int32 [length], with EOS
    notes: Sequence[str] = ()  # what happened to the data on the way in (truncations, counts), for the log

    @property
    def num_groups(self) -> int:
        return len(self.prompt_tokens)

    @functools.cached_property
    def responses_per_group(self) -> int:
        """m: the largest number of responses of any group."""
        return int(sizes_of(self.response_tokens).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates(Texts):
    """Groups of two or more responses, and the pairs among them that may be asked about in a round.

    Pairs are the rows that selection works on; their order breaks ties.
    """

    pairs: np.ndarray  # [N, 3] int32: group, response shown first, response shown second
    pair_ids: Sequence[str]  # N stable, unique names
    prompt_texts: Sequence[Any]  # per group: what a person reads (a string, or a list of chat messages)
    response_texts: Sequence[Sequence[str]]  # per group: one string a response
    content: np.ndarray | None = None  # [N, 4] uint32: digests of the tokens, where ids do not depend on them
    valid: np.ndarray | None = None  # [N] bool, false: a pair that cannot be asked about; None: all can
    fresh: int = 0  # number of groups, the last ones, that the policy wrote in this round

    @property
    def num_pairs(self) -> int:
        return len(self.pairs)

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """What identifies a labelled pair in later rounds: [N, 4] uint32."""
        return digests_of(self.pair_ids) if self.content is None else self.content


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairPool(Candidates):
    """The candidates of a data set, with its preferences and rewards."""

    preferences: np.ndarray  # [N] int8: 0 the first shown is preferred, 1 the second, -1 not in the data
    rewards: np.ndarray | None  # [N, 2] float32: given rewards of (first, second), NaN where there are none


def check_tokens(texts: Texts, vocab_size: int, source: str) -> None:
    """Checks that the embedding has a row for every token id; for others it would give NaN, or another token's row.

    Raises:
      ValueError: an id is `vocab_size` or more: tokenizer and model do not belong together.
    """
    responses = texts.response_tokens
    found = max(
        largest(texts.prompt_tokens),
        largest(responses.arrays if isinstance(responses, Nested) else [r for several in responses for r in several]),
    )
    if found >= vocab_size:
        raise ValueError(
            f"{source}: the tokenizer makes token {found} of it, but the model's embedding has {vocab_size} rows; "
            "expected a tokenizer and a model that belong together: check config.model.path and tokens added to it"
        )


def shared_prompts(texts: Texts, others: Texts) -> int:
    """The number of groups in `texts` whose prompt, as the model sees it, is also in `others`."""
    counts = Counter(prompt.tobytes() for prompt in texts.prompt_tokens)
    for prompt in others.prompt_tokens:  # which may be many more, and need not be held
        counts.pop(prompt.tobytes(), None)
    return texts.num_groups - sum(counts.values())


def group_pairs(m: int) -> np.ndarray:
    """The pairs i < j of m responses, [m(m−1)/2, 2] int32 in the order (0,1), (0,2), ..., (1,2), ..."""
    return np.stack(np.triu_indices(m, 1), axis=1).astype(np.int32)


def assign_buckets(texts: Texts, buckets: Sequence[Bucket]) -> np.ndarray:
    """The smallest bucket that holds each group's prompt and its longest response.

    Args:
      buckets: each at least as large as the one before in both measures, so that the last holds whatever the
        others hold.

    Returns:
      [num_groups] int64, indices into `buckets`.

    Raises:
      ValueError: the buckets are not such a ladder, or no bucket holds some group.
    """
    for small, large in zip(buckets, buckets[1:], strict=False):
        if large.prompt < small.prompt or large.response < small.response or large == small:
            raise ValueError(
                f"buckets (prompt, response): {tuple(large)} after {tuple(small)}; expected each to be at "
                "least as large as the one before in both, and larger in one: change config.data.buckets"
            )
    prompt, response = lengths_of(texts.prompt_tokens), longest_of(texts.response_tokens)
    holds = np.array([(prompt <= b.prompt) & (response <= b.response) for b in buckets])
    homeless = np.flatnonzero(~holds.any(axis=0))
    if len(homeless):
        group = homeless[0]
        raise ValueError(
            f"no bucket holds group {group}, with a prompt of {prompt[group]} and a response of "
            f"{response[group]} tokens ({len(homeless)} such of {len(prompt)} groups); the buckets (prompt, "
            f"response) are {[tuple(b) for b in buckets]}: add a larger one to config.data.buckets"
        )
    return holds.argmax(axis=0)


def pad_groups(texts: Texts, group_rows: np.ndarray, bucket: Bucket, size: int | None = None) -> Groups:
    """Groups as one padded batch, each with m = `texts.responses_per_group` response slots.

    Args:
      group_rows: [n] indices of groups.
      size: the number G of groups in the batch, so that shapes are static: those after the first n are empty,
        with a prompt of one padding token and no responses.  None: n.

    Raises:
      ValueError: a group does not fit the bucket, or n is more than `size`.
    """
    prompts = [texts.prompt_tokens[g] for g in group_rows]
    responses = [texts.response_tokens[g] for g in group_rows]
    return _pad(prompts, responses, texts.responses_per_group, bucket, size)


def pad_pairs(pool: Candidates, pair_rows: np.ndarray, bucket: Bucket, size: int | None = None) -> Groups:
    """Pairs of the pool as one padded batch of groups with m = 2 responses, in the order they are shown.

    Arguments and errors as in `pad_groups`, with [n] pairs of the pool.
    """
    pairs = pool.pairs[pair_rows]
    prompts = [pool.prompt_tokens[g] for g, _, _ in pairs]
    responses = [[pool.response_tokens[g][i] for i in shown] for g, *shown in pairs]
    return _pad(prompts, responses, 2, bucket, size)


def _pad(
    prompts: Sequence[np.ndarray],
    responses: Sequence[Sequence[np.ndarray]],
    m: int,
    bucket: Bucket,
    size: int | None,
) -> Groups:
    """The padding id is 0; any would do, since masks come from the lengths."""
    size = len(prompts) if size is None else size
    if len(prompts) > size:
        raise ValueError(f"{len(prompts)} groups do not fit a batch of {size}")
    prompt_ids = np.zeros((size, bucket.prompt), np.int32)
    prompt_len = np.ones(size, np.int32)
    response_ids = np.zeros((size, m, bucket.response), np.int32)
    response_len = np.zeros((size, m), np.int32)
    for g, (prompt, several) in enumerate(zip(prompts, responses, strict=True)):
        if len(prompt) > bucket.prompt or max(map(len, several)) > bucket.response:
            raise ValueError(
                f"a prompt of {len(prompt)} and a response of {max(map(len, several))} tokens do not fit the "
                f"bucket {tuple(bucket)}: use the bucket that `assign_buckets` gives"
            )
        prompt_ids[g, bucket.prompt - len(prompt) :] = prompt
        prompt_len[g] = len(prompt)
        for j, response in enumerate(several):
            response_ids[g, j, : len(response)] = response
            response_len[g, j] = len(response)
    return Groups(prompt_ids, prompt_len, response_ids, response_len)
