"""Designs that `greedy`'s bounds do not fit, against float64 loops and the probabilities that they say: transductive,
k-center, leverages, k-means++."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from activedpo_jax.selection import strategies
from activedpo_jax.selection.posterior import TIE, condition
from tests.test_selection import INTEGER_ROWS, MASKS, D, K, N, mesh_of, nothing_known
from tests.test_strategies import LAM, SHAPES, Ranked, changed, padded, pick, seen, some_evidence


def dense_transductive(phi: np.ndarray, available: np.ndarray, known: np.ndarray, num_picks: int) -> Ranked:
    """Falls of the sum over the rows that may be picked at the start, by its definition."""
    targets, left = phi[available], available.copy()
    inverse = np.linalg.inv(LAM * np.eye(phi.shape[1]) + known.T @ known)
    rows, scores, margin, unit = [], [], np.inf, None
    for _ in range(min(num_picks, int(available.sum()))):
        before = np.einsum("td,de,te->", targets, inverse, targets)
        falls = np.full(len(phi), -np.inf)
        for row in np.flatnonzero(left).tolist():
            after = np.linalg.inv(np.linalg.inv(inverse) + np.outer(phi[row], phi[row]))
            falls[row] = before - np.einsum("td,de,te->", targets, after, targets)
        unit = np.abs(falls) if unit is None else unit
        tied = falls >= falls.max() - 1e-9 * max(before, 1)
        row = int(np.flatnonzero(tied)[0])
        allowed = 4 * TIE * np.maximum(unit, unit[row]) * 4
        lead = (falls[row] - falls[left & ~tied]) / np.maximum(allowed[left & ~tied], 1e-12)
        margin = min(margin, lead.min(initial=np.inf))
        rows.append(row)
        scores.append(falls[row])
        left[row] = False
        inverse = np.linalg.inv(np.linalg.inv(inverse) + np.outer(phi[row], phi[row]))
    return Ranked(rows, scores, float(margin))


@settings(max_examples=40, deadline=None)
@given(INTEGER_ROWS, MASKS, MASKS, st.sampled_from(SHAPES))
def test_transductive_lowers_the_sum_most(
    features: np.ndarray, available: np.ndarray, known: np.ndarray, shape: tuple[int, int, int]
) -> None:
    phi = features.astype(np.float64)
    expected = dense_transductive(phi, available, phi[known], K)
    assume(expected.margin > 4)
    evidence = changed(some_evidence(6), features=features, posterior=jax.jit(condition)(features, known, LAM))
    picks = pick("transductive", evidence, available, shape)
    assert picks.rows.tolist() == padded(expected.rows, K)
    np.testing.assert_allclose(picks.scores[: len(expected.rows)], expected.scores, rtol=1e-3, atol=1e-4)


def test_transductive_asks_what_others_depend_on() -> None:
    """Twenty pairs that are alike, and an outlier that is longer than any of them."""
    features = np.zeros((N, D), np.float32)
    features[:20, 0], features[20, 1] = 1.0, 1.5
    evidence = changed(some_evidence(6), features=features, posterior=nothing_known(D))
    available = np.arange(N) < 21
    assert pick("transductive", evidence, available, num_picks=1).rows.tolist() == [0]
    assert pick("activedpo", evidence, available, num_picks=1).rows.tolist() == [20]


@settings(max_examples=60, deadline=None)
@given(INTEGER_ROWS, MASKS, MASKS, st.sampled_from(SHAPES))
def test_kcenter_is_the_farthest(
    embeddings: np.ndarray, available: np.ndarray, known: np.ndarray, shape: tuple[int, int, int]
) -> None:
    points = embeddings.astype(np.float64)
    centres, rows, scores, left = [*points[known]], [], [], available.copy()
    for _ in range(min(K, int(available.sum()))):
        distances = [np.sum((points - centre) ** 2, axis=1) for centre in centres or [np.zeros(D)]]
        nearest = np.where(left, np.min(distances, axis=0), -1.0)
        rows.append(int(np.argmax(nearest)))
        scores.append(math.sqrt(nearest[rows[-1]]))
        if not centres:
            centres.append(np.zeros(D))
        centres.append(points[rows[-1]])
        left[rows[-1]] = False
    picks = pick("kcenter", seen(embeddings=embeddings, known=embeddings, counts=known), available, shape)
    assert picks.rows.tolist() == padded(rows, K)
    np.testing.assert_allclose(picks.scores[: len(rows)], scores, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("labelled", [0, 3])
def test_dopt_is_leverage(labelled: int, shape: tuple[int, int, int]) -> None:
    """Of vectors whose sizes along their axes go from 1e-3 to 10, and of fewer than there are axes."""
    rng = np.random.default_rng(labelled)
    for count in (N, 20):
        vectors = (rng.normal(size=(count, 32)) * np.geomspace(1e-3, 10, 32)).astype(np.float32)
        known = rng.normal(size=(3, 32)).astype(np.float32)
        available = np.arange(count) % 5 != 0
        wide = np.concatenate([vectors[available], known[:labelled]]).astype(np.float64)
        whole = vectors.astype(np.float64)
        moment = wide.T @ wide + 1e-6 * np.eye(32)
        scores = np.einsum("nd,nd->n", whole, np.linalg.solve(moment, whole.T).T)
        evidence = seen(fisher_embeddings=vectors, known=known, counts=np.arange(3) < labelled)
        picks = pick("dopt", evidence, available, shape)
        np.testing.assert_allclose(picks.scores, np.sort(scores[available])[::-1][:K], rtol=2e-4)
        np.testing.assert_allclose(scores[picks.rows], picks.scores, rtol=2e-4)
        assert available[picks.rows].all() and len(set(picks.rows)) == K


def test_badge_draws_by_squared_distance() -> None:
    """Three far places: near the first pick is what is like it; of the others, one is twice as far as the other."""
    features = np.zeros((N, D), np.float32)
    features[1, 0], features[2, 1] = 1.0, 2.0  # row 0 stays at the origin
    evidence = seen(features=features, margins=np.zeros(N, np.float32))
    available = jnp.arange(N) < 3
    select = strategies.get("badge").select
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.jit(jax.vmap(lambda key: select(evidence, available, key, 3, 4, mesh_of((1, 1, 1)))))(keys)
    rows, scores = np.asarray(drawn.rows), np.asarray(drawn.scores)
    first = np.bincount(rows[:, 0], minlength=3) / len(rows)
    np.testing.assert_allclose(first, 1 / 3, atol=0.03)
    after_origin = rows[rows[:, 0] == 0]
    assert np.mean(after_origin[:, 1] == 2) == pytest.approx(4 / 5, abs=0.04)  # 2² and 1², halved by p = ½
    np.testing.assert_allclose(scores[rows[:, 0] == 0][:, 1], np.where(after_origin[:, 1] == 2, 1.0, 0.25))
    assert not scores[:, 0].any() and (np.sort(rows, axis=1) == [0, 1, 2]).all()


def test_badge_scales_by_what_the_answer_would_teach_and_leaves_copies_for_the_end() -> None:
    """A pair whose answer is sure has no gradient: its rows are all at the origin, and so copies."""
    features = np.eye(D, dtype=np.float32)[np.arange(N) % D] * 3
    margins = np.where(np.arange(N) < 6, 0.0, 200.0).astype(np.float32)
    available = np.arange(N) < 16
    for key in range(5):
        picks = pick("badge", seen(features=features, margins=margins), available, num_picks=10, key=key)
        distinct = {row if row < 6 else 6 for row in picks.rows[:7].tolist()}
        copies = picks.rows[picks.rows >= 6]
        assert distinct == set(range(7)) and (np.diff(copies[1:]) > 0).all()
