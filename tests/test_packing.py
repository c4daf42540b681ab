"""Packing: every group in one batch that holds it, batches alike, few tokens beside text."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from activedpo_jax.data import packing
from activedpo_jax.data.groups import Texts
from activedpo_jax.data.packing import Axis, Lengths, Packing, Tier


@st.composite
def some_lengths(draw: st.DrawFn) -> Lengths:
    count, m = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.sampled_from([1, 5, 60]))
    return Lengths(1 + numbers.integers(0, most, count), numbers.integers(0, most + 1, (count, m)))


def place(lengths: np.ndarray, axis: Axis) -> bool:
    """Whether an axis has room for texts, one by one: the longest takes the widest place that is left."""
    widths = [width for texts, width in axis.tiers for _ in range(texts)]
    return sum(lengths) <= axis.tokens and all(
        length <= width for length, width in zip(sorted(lengths, reverse=True), widths, strict=False)
    )


def check(found: list[np.ndarray], lengths: Lengths, shapes: list[Packing], together: bool) -> None:
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths.prompts)))
    for rows, shape in zip(found, shapes, strict=True):
        made_up = [1] * (shape.groups - len(rows))
        assert place(np.array([*lengths.prompts[rows], *made_up]), shape.prompts)
        responses = lengths.responses[rows]
        if together:
            assert place(responses.reshape(-1), shape.responses.times(responses.shape[1]))
        turned = np.take_along_axis(responses, packing.in_turn(responses), axis=1)
        assert together or all(place(slot, shape.responses) for slot in turned.T)


@given(lengths=some_lengths(), size=st.integers(1, 9), multiple=st.sampled_from([1, 16]), together=st.booleans())
@settings(deadline=None)
def test_every_batch_of_a_plan_fits_its_shape(lengths: Lengths, size: int, multiple: int, together: bool) -> None:
    found, shape = packing.plan(lengths, size, multiple, together)
    assert len(found) == -(-len(lengths.prompts) // size) and shape.groups == size
    check(found, lengths, [shape] * len(found), together)
    sizes = [axis.tokens for axis in shape] + [tier.width for axis in shape for tier in axis.tiers]
    assert all(number % multiple == 0 for number in sizes)
    again, same = packing.plan(lengths, size, multiple, together)
    assert shape == same and all(map(np.array_equal, found, again))


@given(lengths=some_lengths(), size=st.integers(1, 9), together=st.booleans(), data=st.data())
@settings(deadline=None)
def test_some_of_the_groups_fit_the_shape_of_all(
    lengths: Lengths, size: int, together: bool, data: st.DataObject
) -> None:
    _, shape = packing.plan(lengths, size, 4, together)
    some = np.array(data.draw(st.lists(st.integers(0, len(lengths.prompts) - 1), min_size=1, unique=True)))
    found = packing.fill(lengths.of(some), shape, together)
    check(found, lengths.of(some), [shape] * len(found), together)


@given(lengths=some_lengths(), sizes=st.sampled_from([(1,), (4,), (1, 2, 8), (2, 4)]), data=st.data())
@settings(deadline=None)
def test_any_minibatch_finds_a_shape(lengths: Lengths, sizes: tuple[int, ...], data: st.DataObject) -> None:
    shapes = packing.packings(lengths, sizes, 4)
    assert [shape.groups for shape in shapes] == list(sizes)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths.prompts) - 1), min_size=1, max_size=16)))
    found = packing.minibatch(lengths.of(rows), shapes)
    check([batch.rows for batch in found], lengths.of(rows), [batch.packing for batch in found], together=True)


def test_a_text_longer_than_a_shape_is_refused() -> None:
    lengths = Lengths(np.array([3, 4]), np.array([[2, 5], [1, 1]]))
    _, shape = packing.plan(lengths, 2, 1, together=True)
    longer = Lengths(np.array([3]), np.array([[2, 6]]))
    with pytest.raises(ValueError, match=r"a prompt of 3 and responses of \[2, 6\] tokens do not fit"):
        packing.fill(longer, shape, together=True)


def test_batches_are_alike_and_nearly_all_text() -> None:
    """Lengths as of real pairs, from a few tokens to 500."""
    rng = np.random.default_rng(0)
    lengths = Lengths(
        np.clip(rng.lognormal(4, 0.4, 2000).astype(int), 1, 256),
        np.clip(rng.lognormal(4.6, 0.8, (2000, 2)).astype(int), 1, 512),
    )
    found, shape = packing.plan(lengths, 16, 16, together=True)
    assert packing.useful_share(lengths, found, shape) > 0.9
    apart, wider = packing.plan(lengths, 16, 16, together=False)
    assert packing.useful_share(lengths, apart, wider) > 0.75
    texts = [lengths.text[rows].sum() for rows in found]
    assert packing.useful_share(lengths, found, shape) == sum(texts) / (len(found) * shape.tokens(2))
    shapes = packing.packings(lengths, (2, 8), 16)
    drawn = [packing.minibatch(lengths.of(rng.choice(2000, 8, replace=False)), shapes) for _ in range(100)]
    computed = sum(packing.computed(batch, 2) for batch in drawn)
    assert computed < 100 * 8 * lengths.text.mean() / 0.6


def test_two_tiers_where_two_are_enough() -> None:
    lengths = Lengths(np.array([10, 10, 2, 2]), np.array([[7], [1], [1], [7]]))
    _, shape = packing.plan(lengths, 4, 1, together=True)
    assert shape == Packing(Axis(24, (Tier(2, 10), Tier(2, 2))), Axis(16, (Tier(2, 7), Tier(2, 1))))
    assert shape.tokens(1) == 40


def test_host_and_device_agree_on_turns() -> None:
    lengths = np.random.default_rng(0).integers(0, 5, (7, 6, 3))
    for batch in lengths:
        np.testing.assert_array_equal(packing.in_turn(batch), packing.in_turn(jnp.asarray(batch), jnp))
    assert packing.in_turn(np.array([[1, 2], [1, 2]])).tolist() == [[1, 0], [0, 1]]


def test_lengths_of_texts() -> None:
    token = np.zeros(1, np.int32)
    texts = Texts(prompt_tokens=[token, np.tile(token, 3)], response_tokens=[[np.tile(token, 2)], [token, token]])
    lengths = packing.lengths_in(texts)
    assert lengths.prompts.tolist() == [1, 3] and lengths.responses.tolist() == [[2, 0], [1, 1]]
    assert lengths.text.tolist() == [3, 5]
