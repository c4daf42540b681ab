"""Batches: every example once, the fewest tokens, buckets that fit the data."""

import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from activedpo_jax.data import batches
from activedpo_jax.data.batches import parts
from activedpo_jax.data.groups import Bucket, Texts, assign_buckets

LADDER = [Bucket(100, 100), Bucket(100, 300), Bucket(200, 500)]

in_buckets = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(np.array)
some_sizes = st.sampled_from([(1,), (3,), (4,), (1, 2), (1, 4), (2, 4), (1, 2, 4), (1, 3), (2, 6)])


def texts(lengths: list[tuple[int, int]]) -> Texts:
    return Texts(
        prompt_tokens=[np.zeros(p, np.int32) for p, _ in lengths],
        response_tokens=[[np.zeros(r, np.int32), np.zeros(1, np.int32)] for _, r in lengths],
    )


def least_tokens(bucket_of: list[int], sizes: tuple[int, ...]) -> int:
    """By trying every way to take some examples out as a part."""

    @functools.cache
    def least(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        found = []
        # The first example is in some part, together with any choice of the others.
        for chosen in range(2 ** (len(left) - 1)):
            part = [left[0]] + [b for i, b in enumerate(left[1:]) if chosen >> i & 1]
            others = [b for i, b in enumerate(left[1:]) if not chosen >> i & 1]
            if len(part) <= sizes[-1]:
                prompt, response = LADDER[max(part)]
                size = next(s for s in sizes if s >= len(part))
                found.append(size * (prompt + 2 * response) + least(tuple(others)))
        return min(found)

    return least(tuple(sorted(bucket_of)))


@given(bucket_of=in_buckets, sizes=some_sizes)
@settings(max_examples=60, deadline=None)
def test_no_way_to_cut_a_batch_computes_fewer_tokens(bucket_of: np.ndarray, sizes: tuple[int, ...]) -> None:
    found = parts(bucket_of, LADDER, 2, sizes)
    assert sorted(np.concatenate([part.places for part in found]).tolist()) == list(range(len(bucket_of)))
    for part in found:
        assert len(part.places) <= part.size in sizes
        assert max(bucket_of[part.places]) <= part.bucket
    assert [part.bucket for part in found] == sorted(part.bucket for part in found)
    assert batches.computed(found, LADDER, 2) == least_tokens(bucket_of.tolist(), sizes)


def test_what_a_bucket_leaves_over_fills_a_part_of_the_next() -> None:
    found = parts(np.array([1, 0, 0, 1, 0, 0, 0]), LADDER, 2, [4])
    assert [(part.bucket, part.places.tolist(), part.size) for part in found] == [
        (0, [1, 2, 4, 5], 4),
        (1, [6, 0, 3], 4),
    ]


def test_small_parts_cost_no_less_than_reading_the_weights() -> None:
    tiny = [Bucket(8, 8)]
    (part,) = parts(np.zeros(3, int), tiny, 2, [1, 4])
    assert part.size == 4


@pytest.mark.parametrize(
    ("largest", "multiple", "expected"),
    [(16, 1, (1, 4, 16)), (8, 1, (1, 2, 8)), (6, 1, (1, 3, 6)), (16, 8, (8, 16)), (5, 1, (1, 5)), (8, 8, (8,))],
)
def test_sizes_of_parts(largest: int, multiple: int, expected: tuple[int, ...]) -> None:
    assert batches.sizes(largest, multiple) == expected


lengths = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 128)), min_size=1, max_size=30)


@given(lengths=lengths, most=st.integers(0, 4), multiple=st.sampled_from([8, 16, 32]))
@settings(max_examples=60, deadline=None)
def test_more_buckets_pad_less(lengths: list[tuple[int, int]], most: int, multiple: int) -> None:
    given_ones = (Bucket(32, 64), Bucket(64, 128))
    found = batches.fitted(texts(lengths), given_ones, most, multiple, worth=0.0)
    assert set(given_ones) <= set(found)
    assert len(found) <= 2 + most
    for bucket in set(found) - set(given_ones):
        assert bucket.prompt % multiple == bucket.response % multiple == 0
    before, after = (batches.useful_share(texts(lengths), ladder, 1) for ladder in (given_ones, found))
    assert after >= before
    if len(found) > 2:
        assert after > before


def test_the_bucket_that_saves_most_is_added_and_only_if_it_is_worth_it() -> None:
    # Ten texts of (20, 30) in a bucket of (64, 128): (24, 32) saves 10 × (64 + 256 − 24 − 64) tokens.
    pool = texts([(20, 30)] * 10 + [(60, 120)])
    fitted = functools.partial(batches.fitted, pool, (Bucket(64, 128),), 1, 8)
    assert fitted(2319.0) == (Bucket(24, 32), Bucket(64, 128))
    assert fitted(2320.0) == (Bucket(64, 128),)


def test_buckets_that_are_fitted_are_a_ladder() -> None:
    rng = np.random.default_rng(0)
    pool = texts([(int(p), int(r)) for p, r in zip(rng.integers(1, 65, 200), rng.integers(1, 129, 200), strict=True)])
    found = batches.fitted(pool, (Bucket(64, 128),), 6, 8, 0.0)
    assert len(found) == 7
    assert (np.diff(np.array(found), axis=0) >= 0).all()
    assign_buckets(pool, found)


def test_the_share_of_text() -> None:
    # 10 + 20 + 1 and 12 + 4 + 1 tokens, each in 16 + 2 × 32; the batch of two is padded to three.
    assert batches.useful_share(texts([(10, 20), (12, 4)]), (Bucket(16, 32),), 3) == pytest.approx(48 / (3 * 80))
