"""Padding loses nothing and adds nothing but zeros; every group gets the smallest bucket that holds it."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_jax.data.groups import Bucket, PairPool, assign_buckets, group_pairs, pad_groups, pad_pairs

Tokens = list[int]


def make_pool(groups: list[tuple[Tokens, list[Tokens]]]) -> PairPool:
    """A pool of all pairs of these groups, every second one shown the other way round."""
    pairs = [(g, *p) for g, (_, rs) in enumerate(groups) for p in itertools.combinations(range(len(rs)), 2)]
    pairs = [(g, j, i) if row % 2 else (g, i, j) for row, (g, i, j) in enumerate(pairs)]
    return PairPool(
        prompt_tokens=[np.array(p, np.int32) for p, _ in groups],
        response_tokens=[[np.array(r, np.int32) for r in rs] for _, rs in groups],
        pairs=np.array(pairs, np.int32),
        pair_ids=[str(i) for i in range(len(pairs))],
        preferences=np.zeros(len(pairs), np.int8),
        rewards=None,
        prompt_texts=[""] * len(groups),
        response_texts=[[""] * len(rs) for _, rs in groups],
    )


# Token 0, which is also what padding is made of, comes up often.
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5)
pools = st.lists(st.tuples(tokens, st.lists(tokens, min_size=2, max_size=4)), min_size=1, max_size=5).map(make_pool)


def unpad(batch: Any) -> list[tuple[Tokens, list[Tokens]]]:
    """The groups of a batch, as their lengths and the sides of the padding have it."""
    out = []
    for ids, length, answers, lengths in zip(*batch, strict=True):
        out.append((ids[len(ids) - length :].tolist(), [r[:n].tolist() for r, n in zip(answers, lengths, strict=True)]))
    return out


@given(pools, st.data())
@settings(deadline=None, max_examples=50)
def test_padded_groups_come_back(pool: PairPool, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, pool.num_groups - 1), max_size=4)), np.int64)
    extra = data.draw(st.integers(0, 2))
    m = pool.responses_per_group
    batch = pad_groups(pool, rows, Bucket(6, 7), len(rows) + extra)
    assert [x.shape for x in batch] == [(len(rows) + extra, *s) for s in ((6,), (), (m, 7), (m,))]
    assert {x.dtype for x in batch} == {np.dtype(np.int32)}
    back = unpad(batch)
    for (prompt, responses), row in zip(back, rows, strict=False):
        expected = [r.tolist() for r in pool.response_tokens[row]]
        assert prompt == pool.prompt_tokens[row].tolist()
        assert responses == expected + [[]] * (m - len(expected))
    assert back[len(rows) :] == [([0], [[]] * m)] * extra
    # Beside the tokens there is nothing but zeros.
    kept = sum(sum(p) + sum(map(sum, rs)) for p, rs in back)
    assert batch.prompt_ids.sum() + batch.response_ids.sum() == kept


@given(pools)
@settings(deadline=None, max_examples=25)
def test_pairs_are_padded_in_the_order_they_are_shown(pool: PairPool) -> None:
    rows = np.arange(len(pool.pairs))[::-1]
    for (prompt, responses), row in zip(unpad(pad_pairs(pool, rows, Bucket(5, 5))), rows, strict=True):
        group, first, second = pool.pairs[row]
        assert prompt == pool.prompt_tokens[group].tolist()
        assert responses == [pool.response_tokens[group][i].tolist() for i in (first, second)]


def test_size_of_a_batch_of_pairs() -> None:
    pool = make_pool([([1, 2], [[3], [4], [5]])])
    batch = pad_pairs(pool, np.array([1]), Bucket(2, 2), 3)
    assert batch.response_len.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert batch.prompt_len.tolist() == [2, 1, 1]


def test_what_does_not_fit_is_not_cut() -> None:
    pool = make_pool([([1, 2, 3], [[4, 4], [5]])])
    with pytest.raises(ValueError, match="prompt of 3 .* response of 2 tokens do not fit the bucket"):
        pad_groups(pool, np.array([0]), Bucket(2, 2))
    with pytest.raises(ValueError, match="do not fit the bucket"):
        pad_pairs(pool, np.array([0]), Bucket(3, 1))
    with pytest.raises(ValueError, match="2 groups do not fit a batch of 1"):
        pad_groups(pool, np.array([0, 0]), Bucket(3, 2), 1)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_pairs_of_a_group(m: int) -> None:
    assert group_pairs(m).tolist() == [list(p) for p in itertools.combinations(range(m), 2)]


@given(pools)
@settings(deadline=None, max_examples=50)
def test_each_group_gets_the_first_bucket_that_holds_it(pool: PairPool) -> None:
    buckets = [Bucket(1, 1), Bucket(2, 3), Bucket(4, 3), Bucket(5, 5)]
    for group, chosen in enumerate(assign_buckets(pool, buckets)):
        sizes = len(pool.prompt_tokens[group]), max(len(r) for r in pool.response_tokens[group])
        fits = [sizes[0] <= b.prompt and sizes[1] <= b.response for b in buckets]
        assert chosen == fits.index(True)


def test_no_bucket_is_large_enough() -> None:
    pool = make_pool([([1], [[2], [3]]), ([1], [[2], [3, 3, 3]])])
    message = (
        r"no bucket holds group 1, with a prompt of 1 and a response of 3 .*\(1 such of 2 .*\[\(4, 2\)\].*data.buckets"
    )
    with pytest.raises(ValueError, match=message):
        assign_buckets(pool, [Bucket(4, 2)])


@pytest.mark.parametrize("buckets", [((4, 4), (2, 2)), ((2, 4), (4, 2)), ((2, 2), (2, 2))])
def test_buckets_that_are_no_ladder(buckets: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="expected each to be at least as large.*config.data.buckets"):
        assign_buckets(make_pool([([1], [[2], [3]])]), [Bucket(*b) for b in buckets])
