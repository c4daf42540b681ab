"""Every strategy against a plain loop in float64, on one device and on eight; what happens where there is little to
rank by."""

import functools
import importlib
import math
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection import strategies
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.posterior import TIE, condition, information_gain
from activedpo_jax.selection.strategies import STRATEGIES, Evidence
from tests.test_selection import INTEGER_ROWS, MASKS, D, K, N, dense_greedy, mesh_of, nothing_known

SHAPES = [(1, 1, 1), (2, 2, 2)]
LAM = 0.5
FALLS_BACK = ["apl_certainty", "aplp", "margin"]
OF_ALL_ROWS = ("posterior", "lam", "known", "counts")
VECTORS = ("features", "embeddings", "fisher_features", "fisher_embeddings")
# The others, which choose prompt by prompt, are in `test_per_prompt`.
POOL = sorted(name for name, strategy in STRATEGIES.items() if "rewards" not in strategy.needs)


@functools.cache
def program(name: str, shape: tuple[int, int, int], num_picks: int) -> Any:
    select = strategies.get(name).select
    return jax.jit(lambda evidence, available, key: select(evidence, available, key, num_picks, 4, mesh_of(shape)))


def pick(
    name: str,
    evidence: Evidence,
    available: Any,
    shape: tuple[int, int, int] = (1, 1, 1),
    num_picks: int = K,
    key: int = 0,
) -> Picks:
    """The picks of a compiled strategy, of rows cut over the devices where these divide them."""
    count = len(available)
    by_rows, whole = (NamedSharding(mesh_of(shape), s) for s in (P(mesh_of(shape).axis_names), P()))

    def put(x: Any, rows: bool) -> jax.Array:
        return jax.device_put(np.asarray(x), by_rows if rows and count % math.prod(shape) == 0 else whole)

    fields = {field: None if x is None else put(x, field not in OF_ALL_ROWS) for field, x in evidence.items()}
    picks = program(name, shape, num_picks)(seen(**fields), put(available, True), jax.random.key(key))
    return jax.tree.map(np.asarray, picks)


def seen(**fields: Any) -> Evidence:
    """Evidence of NumPy arrays, too."""
    return Evidence(**fields)


def changed(evidence: Evidence, **fields: Any) -> Evidence:
    return {**evidence, **fields}


def padded(rows: Any, num_picks: int) -> list[int]:
    return [*rows, *[-1] * (num_picks - len(rows))][:num_picks]


def some_evidence(seed: int, count: int = N) -> Evidence:
    """All kinds, random; three pairs a prompt."""
    rng = np.random.default_rng(seed)
    groups = np.arange(count, dtype=np.int32) // 3
    known = rng.normal(size=(4, D)).astype(np.float32)
    return seen(
        **{name: rng.normal(size=(count, D)).astype(np.float32) for name in VECTORS},
        margins=rng.normal(size=count).astype(np.float32),
        entropies=rng.random(count).astype(np.float32)[groups],
        groups=groups,
        posterior=np.asarray(condition(jnp.asarray(known), jnp.ones(4, bool), LAM)),
        known=known,
        counts=np.ones(4, bool),
        lam=LAM,
    )


# --------------------------------------------------------------------------------------- what holds for all of them


def test_there_is_a_file_for_each() -> None:
    files = {module.name for module in pkgutil.iter_modules(strategies.__path__)} - {"base", "d_optimal", "per_prompt"}
    assert files == set(STRATEGIES)
    for name in files:
        assert importlib.import_module(f"{strategies.__name__}.{name}").STRATEGY is STRATEGIES[name]


@pytest.mark.parametrize("name", POOL)
def test_missing_evidence_is_named(name: str) -> None:
    strategy = STRATEGIES[name]
    arguments = (jnp.ones(4, bool), jax.random.key(0), 2, 4, mesh_of((1, 1, 1)))
    if not strategy.needs:
        strategy.select(seen(), *arguments)
        return
    for need in strategy.needs:
        with pytest.raises(ValueError, match=f"strategy {name} needs the evidence .*`{need}`"):
            strategy.select(changed(some_evidence(0, 4), **{need: None}), *arguments)


@pytest.mark.parametrize("name", POOL)
def test_what_a_strategy_does_not_name_it_does_not_look_at(name: str) -> None:
    strategy, evidence = STRATEGIES[name], some_evidence(1)
    named = strategy.needs | {"groups", "lam"} | ({"posterior", "known", "counts"} if strategy.design else set())
    less = seen(**{field: x if field in named else None for field, x in evidence.items()})
    available = np.arange(N) % 4 != 0
    expected = pick(name, evidence, available)
    assert pick(name, less, available).rows.tolist() == expected.rows.tolist()
    assert not expected.fallback and (expected.rows >= 0).all()
    assert expected.scores.any() == strategy.ranks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", POOL)
def test_rows_run_out(name: str, shape: tuple[int, int, int]) -> None:
    """Fewer rows than picks, and fewer rows in all than picks; those that may not be picked hold anything."""
    evidence = some_evidence(2)
    available = np.zeros(N, bool)
    available[[3, 5, 17]] = True
    evidence = changed(
        evidence,
        **{
            field: np.where(available.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)
            for field, x in evidence.items()
            if field in (*VECTORS, "margins", "entropies")
        },
    )
    for count in (K, 2 * N):
        picks = pick(name, evidence, available, shape, count)
        assert sorted(picks.rows[:3].tolist()) == [3, 5, 17]
        assert picks.rows[3:].tolist() == [-1] * (count - 3)
        assert np.isfinite(picks.scores).all() and not picks.scores[3:].any()
    none = pick(name, evidence, np.zeros(N, bool), shape)
    assert none.rows.tolist() == [-1] * K and not none.scores.any() and not none.fallback


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in POOL for field in sorted(STRATEGIES[name].needs)],
)
def test_numbers_that_are_not_finite_are_not_ranked(
    name: str, field: str, value: float, shape: tuple[int, int, int]
) -> None:
    """Margins are all zero else, which is no reason to fall back."""
    evidence = changed(some_evidence(3), margins=np.zeros(N, np.float32))
    broken = np.array(evidence[field])
    broken[13] = value
    picks = pick(name, changed(evidence, **{field: broken}), np.ones(N, bool), shape)
    assert picks.rows.tolist() == [-1] * K and np.isnan(picks.scores).all() and not picks.fallback


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", POOL)
def test_the_same_on_any_mesh_and_padding(name: str, flat: bool) -> None:
    """240 rows, every one of them twice or more, and 8 rows of padding."""
    evidence, count = some_evidence(4, 240), 240
    copies = np.random.default_rng(0).permutation(np.arange(count) % 100)
    margins = np.zeros(count, np.float32) if flat else np.asarray(evidence["margins"])[copies]
    evidence = changed(
        evidence,
        **{name: np.asarray(evidence[name])[copies] for name in VECTORS},
        margins=margins,
    )
    available = np.arange(count) % 7 != 0
    expected = pick(name, evidence, available, num_picks=60)
    assert expected.fallback == (flat and name in FALLS_BACK)
    for shape in [(8, 1, 1), (2, 2, 2), (1, 4, 2)]:
        picks = pick(name, evidence, available, shape, 60)
        assert picks.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(
            picks.scores, expected.scores, rtol=1e-5, atol=1e-6 * max(1.0, float(expected.scores.max()))
        )
        assert picks.fallback == expected.fallback
    more = {
        field: np.pad(x, [(0, 8)] + [(0, 0)] * (x.ndim - 1))
        for field, x in evidence.items()
        if field not in OF_ALL_ROWS
    }
    picks = pick(name, changed(evidence, **more), np.pad(available, (0, 8)), num_picks=60)
    assert picks.rows.tolist() == expected.rows.tolist() and picks.fallback == expected.fallback


@pytest.mark.parametrize("name", POOL)
def test_gains_are_information(name: str) -> None:
    """Where a strategy says so, its scores add up to the growth of log det V."""
    strategy, rng = STRATEGIES[name], np.random.default_rng(5)
    if not strategy.gains:
        return
    assert strategy.design is not None
    known = rng.normal(size=(4, D))
    evidence = some_evidence(5)
    evidence = changed(evidence, posterior=condition(jnp.asarray(known, jnp.float32), jnp.ones(4, bool), LAM))
    picks = pick(name, evidence, np.ones(N, bool))
    chosen = np.asarray(evidence[strategy.design], np.float64)[picks.rows]
    before = LAM * np.eye(D) + known.T @ known
    expected = np.linalg.slogdet(before + chosen.T @ chosen)[1] - np.linalg.slogdet(before)[1]
    assert float(information_gain(jnp.asarray(picks.scores))) == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------------- by vectors of pairs


class Ranked(NamedTuple):
    rows: list[int]
    scores: list[float]
    margin: float  # the least lead of a pick over the best row not tied with it, in units of float32's tolerance


def dense_largest(scores: np.ndarray, unit: np.ndarray, available: np.ndarray, num_picks: int) -> Ranked:
    left, rows, margin = np.where(available, scores, -np.inf), [], np.inf
    for _ in range(min(num_picks, int(available.sum()))):
        tied = left >= left.max() - 1e-9 * max(left.max(), 1e-9)
        row = int(np.flatnonzero(tied)[0])
        lead = (left[row] - left) / np.maximum(np.maximum(unit, unit[row]), 1e-300)
        margin = min(margin, lead[~tied].min(initial=np.inf))
        rows.append(row)
        left[row] = -np.inf
    return Ranked(rows, scores[rows].tolist(), float(margin))


@settings(max_examples=100, deadline=None)
@given(INTEGER_ROWS, MASKS, MASKS, st.sampled_from([0.25, 1.0, 4.0]), st.sampled_from(SHAPES))
def test_topk_is_the_largest_variances(
    features: np.ndarray, available: np.ndarray, known: np.ndarray, lam: float, shape: tuple[int, int, int]
) -> None:
    phi = features.astype(np.float64)
    inverse = np.linalg.inv(lam * np.eye(D) + phi[known].T @ phi[known])
    scores = np.einsum("nd,de,ne->n", phi, inverse, phi)
    expected = dense_largest(scores, TIE * np.sum(phi**2, axis=1) / lam, available, K)
    assume(expected.margin > 4)
    evidence = seen(
        features=features,
        posterior=jax.jit(condition)(features, known, lam),
        lam=lam,
    )
    picks = pick("activedpo_topk", evidence, available, shape)
    assert picks.rows.tolist() == padded(expected.rows, K)
    np.testing.assert_allclose(picks.scores[: len(expected.rows)], expected.scores, rtol=1e-4, atol=1e-5)
    first = pick("activedpo", evidence, available, shape, num_picks=1)
    assert first.rows.tolist() == padded(expected.rows, 1)  # no update has been made yet


def test_topk_counts_what_float32_does_not_resolve_as_zero() -> None:
    """Twenty labels of one pair with λ = 1e-5: its variance is 1/20, and ‖φ‖²/λ = 1e5 is known to 0.1."""
    features = np.zeros((8, D), np.float32)
    features[2:, 0] = 1.0
    w = condition(jnp.tile(jnp.asarray(features[2]), (20, 1)), jnp.ones(20, bool), 1e-5)
    picks = pick("activedpo_topk", seen(features=features, posterior=w, lam=1e-5), np.ones(8, bool))
    assert picks.rows.tolist() == list(range(K)) and not picks.scores.any()


@settings(max_examples=60, deadline=None)
@given(INTEGER_ROWS, MASKS, st.sampled_from(SHAPES))
def test_norm_is_the_longest(features: np.ndarray, available: np.ndarray, shape: tuple[int, int, int]) -> None:
    norms = np.sum(features.astype(np.float64) ** 2, axis=1)
    expected = sorted(np.flatnonzero(available), key=lambda row: (-norms[row], row))[:K]
    picks = pick("activedpo_norm", seen(features=features), available, shape)
    assert picks.rows.tolist() == padded(expected, K)
    assert picks.scores.tolist() == [*norms[expected], *[0.0] * (K - len(expected))]


@pytest.mark.parametrize("name", ["activedpo_norm", "activedpo_topk"])
def test_nearly_equal_rows_are_tied_and_others_are_not(name: str) -> None:
    row = np.random.default_rng(1).normal(size=64)
    features = np.zeros((40, 64), np.float32)
    features[9], features[30] = row, row * (1 + 2e-7)  # the same text elsewhere in a batch: the lower row
    evidence = lambda features: seen(features=features, posterior=nothing_known(64), lam=1.0)  # noqa: E731
    assert pick(name, evidence(features), np.ones(40, bool), num_picks=2).rows.tolist() == [9, 30]
    features[30] = row * (1 + 2e-6)  # another text: the better row
    assert pick(name, evidence(features), np.ones(40, bool), num_picks=2).rows.tolist() == [30, 9]


GREEDY = {"apo": "embeddings", "adpo": "fisher_embeddings", "activedpo_fisher": "fisher_features"}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(GREEDY)), INTEGER_ROWS, MASKS, MASKS, st.sampled_from(SHAPES))
def test_greedy_on_other_vectors(
    name: str, vectors: np.ndarray, available: np.ndarray, known: np.ndarray, shape: tuple[int, int, int]
) -> None:
    expected = dense_greedy(vectors, available, vectors[known], LAM, K)
    assume(expected.margin > 4)
    posterior = jax.jit(condition)(vectors, known, LAM)
    picks = pick(name, changed(some_evidence(6), **{GREEDY[name]: vectors}, posterior=posterior), available, shape)
    assert picks.rows.tolist() == padded(expected.rows.tolist(), K)
    np.testing.assert_allclose(picks.scores[: len(expected.rows)], expected.scores, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- by margins and entropies

MARGINS = st.lists(st.integers(-3, 3), min_size=N, max_size=N).map(lambda x: np.array(x, np.float32) / 4)
PROMPTS = st.lists(st.integers(0, 8), min_size=N, max_size=N).map(lambda x: np.array(x, np.int32) * 5)
ENTROPIES = st.lists(st.integers(-2, 3), min_size=41, max_size=41).map(lambda x: np.array(x, np.float32) / 2)


def assert_picked(picks: Picks, rows: list[int], margins: np.ndarray, available: np.ndarray) -> None:
    if available.any() and not margins[available].any():
        assert picks.fallback and not picks.scores.any()
        assert picks.rows.tolist() == pick("random", seen(), available).rows.tolist()
    else:
        assert not picks.fallback
        assert picks.rows.tolist() == padded(rows, K)
        assert picks.scores.tolist() == [*np.abs(margins[rows[:K]]), *[0.0] * (K - len(rows[:K]))]


@settings(max_examples=80, deadline=None)
@given(MARGINS, MASKS, st.sampled_from(SHAPES))
def test_margin_is_the_least_sure(margins: np.ndarray, available: np.ndarray, shape: tuple[int, int, int]) -> None:
    rows = sorted(np.flatnonzero(available).tolist(), key=lambda row: (abs(margins[row]), row))
    picks = pick("margin", seen(margins=margins), available, shape)
    assert_picked(picks, rows, margins, available)


@settings(max_examples=40, deadline=None)
@given(MARGINS, MASKS, st.sampled_from(SHAPES))
def test_apl_certainty_is_the_surest(margins: np.ndarray, available: np.ndarray, shape: tuple[int, int, int]) -> None:
    rows = sorted(np.flatnonzero(available).tolist(), key=lambda row: (-abs(margins[row]), row))
    picks = pick("apl_certainty", seen(margins=margins), available, shape)
    assert_picked(picks, rows, margins, available)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, ENTROPIES, MASKS, st.sampled_from(SHAPES))
def test_apl_entropy_goes_round_the_prompts_as_their_entropy_falls(
    groups: np.ndarray, entropy_of: np.ndarray, available: np.ndarray, shape: tuple[int, int, int]
) -> None:
    picks = pick("apl_entropy", seen(entropies=entropy_of[groups], groups=groups), available, shape, num_picks=2 * N)
    rows = picks.rows[picks.rows >= 0]
    assert sorted(rows.tolist()) == np.flatnonzero(available).tolist()
    turn = [int(np.sum(groups[rows[:i]] == groups[row])) for i, row in enumerate(rows)]  # before it, of its prompt
    order = [(t, -entropy_of[groups[row]]) for t, row in zip(turn, rows, strict=True)]
    assert order == sorted(order)
    assert picks.scores[: len(rows)].tolist() == entropy_of[groups[rows]].tolist()


def test_apl_entropy_draws_which_pair_of_a_prompt_comes_first() -> None:
    evidence = seen(entropies=np.ones(3, np.float32), groups=np.zeros(3, np.int32))
    assert {
        int(pick("apl_entropy", evidence, np.ones(3, bool), num_picks=1, key=key).rows[0]) for key in range(20)
    } == {
        0,
        1,
        2,
    }


@settings(max_examples=200, deadline=None)
@given(MARGINS, PROMPTS, ENTROPIES, MASKS, st.sampled_from(SHAPES))
def test_aplp_is_the_largest_margins_of_the_least_certain_prompts(
    margins: np.ndarray,
    groups: np.ndarray,
    entropy_of: np.ndarray,
    available: np.ndarray,
    shape: tuple[int, int, int],
) -> None:
    """Prompts with numbers from 0 to 40, in any order of rows, some with no pair that may be picked."""
    choices = np.flatnonzero(available).tolist()
    prompts = sorted({int(groups[row]) for row in choices}, key=lambda g: (-entropy_of[g], g))
    half = prompts[: math.ceil(len(prompts) / 2)]
    by_margin = sorted(choices, key=lambda row: (-abs(margins[row]), row))
    rows = [row for row in by_margin if groups[row] in half]
    rows += [row for g in prompts[len(half) :] for row in by_margin if groups[row] == g]
    evidence = seen(margins=margins, entropies=entropy_of[groups], groups=groups)
    assert_picked(pick("aplp", evidence, available, shape), rows, margins, available)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FALLS_BACK)
def test_all_margins_zero_is_random_and_says_so(name: str, shape: tuple[int, int, int]) -> None:
    """−0 is zero too, and rows that may not be picked do not count."""
    available = np.arange(N) % 5 != 0
    margins = np.where(available, np.where(np.arange(N) % 2, 0.0, -0.0), 1.0).astype(np.float32)
    evidence = changed(some_evidence(7), margins=margins)
    for key in (0, 1):
        picks = pick(name, evidence, available, shape, key=key)
        expected = pick("random", evidence, available, shape, key=key)
        assert picks.fallback and picks.rows.tolist() == expected.rows.tolist() and not picks.scores.any()
    margins[7] = 1e-30  # one pair that the reward can tell apart
    picks = pick(name, changed(evidence, margins=margins), available, shape)
    assert not picks.fallback


def test_entropies_decide_before_margins() -> None:
    """By hand: prompts 0 to 2 of two pairs each; the two with the highest entropy come first."""
    evidence = seen(
        margins=np.array([9, 8, 1, 2, 3, 4], np.float32),
        entropies=np.array([1, 1, 7, 7, 5, 5], np.float32),
        groups=np.array([0, 0, 1, 1, 2, 2], np.int32),
    )
    assert pick("aplp", evidence, np.ones(6, bool)).rows.tolist() == [5, 4, 3, 2, 0, 1]
    assert pick("aplp", evidence, np.array([1, 1, 1, 1, 0, 0], bool)).rows.tolist() == [3, 2, 0, 1, -1, -1]
