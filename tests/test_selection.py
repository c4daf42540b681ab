"""Selection against what it replaces: dense V⁻¹ in float64 and the naive loop; on 8 simulated devices as on one."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.selection import strategies
from activedpo_jax.selection.greedy import TIE, Picks, greedy
from activedpo_jax.selection.posterior import FLOOR, condition, information_gain, resolved_lam, variances

SHAPES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)]


@functools.cache
def mesh_of(shape: tuple[int, int, int]) -> Mesh:
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


class Reference(NamedTuple):
    rows: np.ndarray  # [K]
    scores: np.ndarray  # [K]
    ties: np.ndarray  # [K] rows that had the best score
    margin: float  # the least lead of a pick over the best row not tied with it, in units of float32's tolerance


def dense_greedy(
    features: np.ndarray, available: np.ndarray, labelled: np.ndarray, lam: float, num_picks: int
) -> Reference:
    """The naive loop, float64, with V⁻¹ as a dense matrix (Sherman–Morrison after each pick)."""
    phi, labelled = features.astype(np.float64), labelled.astype(np.float64)
    inverse = np.linalg.inv(lam * np.eye(phi.shape[1]) + labelled.T @ labelled)
    scores = np.where(available, np.einsum("nd,nd->n", phi @ inverse, phi), -np.inf)
    unit = TIE * np.sum(phi**2, axis=1) / lam
    rows, picked, ties, margin = [], [], [], np.inf
    for _ in range(min(num_picks, int(available.sum()))):
        tied = scores >= scores.max() - 1e-9 * max(scores.max(), 1e-9)
        row = int(np.flatnonzero(tied)[0])
        rest = (scores[row] - scores) / np.maximum(np.maximum(unit, unit[row]), 1e-300)
        margin = min(margin, rest[~tied].min(initial=np.inf))
        rows.append(row)
        picked.append(scores[row])
        ties.append(tied.sum())
        u = inverse @ phi[row]
        inverse -= np.outer(u, u) / (1 + scores[row])
        scores = scores - (phi @ u) ** 2 / (1 + scores[row])
        scores[row] = -np.inf
    return Reference(np.array(rows), np.array(picked), np.array(ties), float(margin))


def pick(features: Any, available: Any, posterior: Any, lam: float, **static: Any) -> Picks:
    return jax.tree.map(np.asarray, greedy(features, available, posterior, lam, **static))


def nothing_known(dim: int) -> np.ndarray:
    return np.zeros((0, dim), np.float32)


# ----------------------------------------------------------------------------------------------- the large pool

LAM, PICKS = 0.5, 50


class Pool(NamedTuple):
    features: np.ndarray
    available: np.ndarray
    labelled: np.ndarray
    reference: Reference


@functools.cache
def large_pool() -> Pool:
    """20,000 × 1,024: clusters of which few are common and most rare, heavy-tailed norms, and duplicated rows."""
    rng = np.random.default_rng(7)
    n, dim, clusters = 20_000, 1_024, 400
    share = 1 / np.arange(1, clusters + 1) ** 1.2
    cluster = rng.choice(clusters, size=n, p=share / share.sum())
    centres = rng.normal(size=(clusters, dim)) / np.sqrt(dim)
    features = centres[cluster] + 0.4 * rng.normal(size=(n, dim)) / np.sqrt(dim)
    features = (features * rng.gamma(3.0, 0.4, size=(n, 1))).astype(np.float32)
    # Every one of the 300 longest rows is repeated once or more, anywhere before or after it.
    longest = np.argsort(-np.linalg.norm(features, axis=1))[:300]
    copies = rng.choice(np.setdiff1d(np.arange(n), longest), size=450, replace=False)
    features[copies] = features[np.concatenate([longest, longest[:150]])]
    known = rng.choice(n, size=120, replace=False)
    available = np.ones(n, bool)
    available[known] = False
    reference = dense_greedy(features, available, features[known], LAM, PICKS)
    return Pool(features, available, features[known], reference)


def test_the_large_pool_is_a_test() -> None:
    """Duplicates tie, order within the batch matters, labels matter, and float32 can tell the other rows apart."""
    features, available, labelled, reference = large_pool()
    assert (reference.ties > 1).sum() > 20
    by_norm = set(np.argsort(-np.linalg.norm(features, axis=1))[:PICKS].tolist())
    assert len(by_norm & set(reference.rows.tolist())) < PICKS // 2
    unlabelled = dense_greedy(features, available, nothing_known(features.shape[1]), LAM, 10)
    assert unlabelled.rows.tolist() != reference.rows[:10].tolist()
    assert reference.margin > 4


@pytest.mark.parametrize(("shape", "block"), [*((shape, 16) for shape in SHAPES), ((1, 1, 1), 1024), ((2, 2, 2), 1024)])
def test_picks_are_those_of_the_dense_loop(shape: tuple[int, int, int], block: int) -> None:
    features, available, labelled, reference = large_pool()
    mesh = mesh_of(shape)
    rows = NamedSharding(mesh, P(mesh.axis_names))
    posterior = np.asarray(condition(jnp.asarray(labelled), jnp.ones(len(labelled), bool), LAM))
    picks = pick(
        jax.device_put(features, rows),
        jax.device_put(available, rows),
        posterior,
        LAM,
        num_picks=PICKS,
        block=block,
        mesh=mesh,
    )
    assert picks.rows.tolist() == reference.rows.tolist()
    np.testing.assert_allclose(picks.scores, reference.scores, rtol=2e-5)


# ------------------------------------------------------------------------------------------------- ties and edges


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["equal", "zero", "three", "orthogonal"])
def test_ties_go_to_the_lowest_row(kind: str, shape: tuple[int, int, int]) -> None:
    """Ties over more rows than any block holds, on every device; 203 rows, which 8 devices do not divide."""
    n, dim, k = 203, 257, 40
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    features = {
        "equal": np.tile(rows[0], (n, 1)),
        "zero": np.zeros((n, dim), np.float32),
        "three": rows[np.arange(n) % 3] * np.array([0.5, 2.0, 1.0], np.float32)[np.arange(n) % 3, None],
        "orthogonal": np.eye(dim, dtype=np.float32)[rng.permutation(dim)[:n]],
    }[kind]
    available = np.arange(n) % 5 != 0
    static: dict[str, Any] = {"num_picks": k, "block": 3, "mesh": mesh_of(shape)}
    picks = pick(features, available, nothing_known(dim), 0.01, **static)
    expected = dense_greedy(features, available, nothing_known(dim), 0.01, k)
    assert picks.rows.tolist() == expected.rows.tolist()
    if kind != "three":
        assert picks.rows.tolist() == np.flatnonzero(available)[:k].tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_nearly_equal_rows_are_tied_and_others_are_not(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    row = rng.normal(size=64)
    row /= np.linalg.norm(row)
    features = np.zeros((40, 64), np.float32)
    features[9], features[30] = row, row * (1 + 2e-7)  # the same text elsewhere in a batch: the lower row
    static: dict[str, Any] = {"num_picks": 1, "block": 2, "mesh": mesh_of(shape)}
    assert pick(features, np.ones(40, bool), nothing_known(64), 1.0, **static).rows.tolist() == [9]
    features[30] = row * (1 + 2e-6)  # another text: the better row
    assert pick(features, np.ones(40, bool), nothing_known(64), 1.0, **static).rows.tolist() == [30]


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1)])
def test_too_few_rows(shape: tuple[int, int, int]) -> None:
    """Rows that may not be picked never are, whatever they hold, also when the rest is worth nothing."""
    features = np.zeros((20, 4), np.float32)
    features[3, 0] = 1.0
    available = np.zeros(20, bool)
    available[[3, 7, 15]] = True
    features[~available] = np.nan
    picks = pick(features, available, nothing_known(4), 1.0, num_picks=6, block=16, mesh=mesh_of(shape))
    assert picks.rows.tolist() == [3, 7, 15, -1, -1, -1]
    assert picks.scores.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1)])
def test_numbers_that_are_not_finite_are_not_ranked(shape: tuple[int, int, int]) -> None:
    features = np.ones((20, 4), np.float32)
    features[13, 2] = np.inf
    picks = pick(features, np.ones(20, bool), nothing_known(4), 1.0, num_picks=3, block=16, mesh=mesh_of(shape))
    assert picks.rows.tolist() == [-1, -1, -1] and np.isnan(picks.scores).all()


def test_bad_arguments_are_named() -> None:
    features, available, w = np.zeros((5, 4), np.float32), np.ones(5, bool), nothing_known(4)
    static: dict[str, Any] = {"num_picks": 2, "block": 4, "mesh": mesh_of((1, 1, 1))}
    with pytest.raises(ValueError, match=r"features must be .* got \(5, 4\) float16"):
        greedy(features.astype(np.float16), available, w, 1.0, **static)
    with pytest.raises(ValueError, match=r"available must be \[5\] bool.* got \(4,\)"):
        greedy(features, available[:4], w, 1.0, **static)
    with pytest.raises(ValueError, match=r"posterior must be \[n, 4\].* got \(0, 3\)"):
        greedy(features, available, nothing_known(3), 1.0, **static)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        greedy(features, available, w, 1.0, **static | {"num_picks": 0})


# ---------------------------------------------------------------------------------------------------- properties

# Small integers: ties are exact and common, and what is not tied is nearly always too far apart for float32 to confuse.
N, D, K = 24, 5, 6
INTEGER_ROWS = st.lists(
    st.lists(st.integers(-2, 2), min_size=D, max_size=D), min_size=N, max_size=N
).map(lambda rows: np.array(rows, np.float32))  # fmt: skip
MASKS = st.lists(st.booleans(), min_size=N, max_size=N).map(np.array)


@settings(max_examples=150, deadline=None)
@given(
    features=INTEGER_ROWS,
    available=MASKS,
    known=MASKS,
    lam=st.sampled_from([0.25, 1.0, 4.0]),
    placement=st.sampled_from([((1, 1, 1), 2), ((1, 1, 1), 24), ((2, 2, 2), 1), ((1, 4, 2), 3)]),
)
def test_small_pools_of_ties(
    features: np.ndarray, available: np.ndarray, known: np.ndarray, lam: float, placement: Any
) -> None:
    posterior = jax.jit(condition)(features, known, lam)
    picks = pick(
        features, available, np.asarray(posterior), lam, num_picks=K, block=placement[1], mesh=mesh_of(placement[0])
    )
    expected = dense_greedy(features, available, features[known], lam, K)
    assume(expected.margin > 4)
    filled = min(K, int(available.sum()))
    assert picks.rows.tolist() == expected.rows.tolist() + [-1] * (K - filled)
    np.testing.assert_allclose(picks.scores[:filled], expected.scores, rtol=1e-4, atol=1e-5)
    assert not picks.scores[filled:].any()
    assert len(set(picks.rows[:filled].tolist())) == filled and available[picks.rows[:filled]].all()
    assert (np.diff(picks.scores) <= 1e-5).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 5.0))
def test_greedy_keeps_its_promise(seed: int, lam: float) -> None:
    """Nemhauser, Wolsey & Fisher (1978): at least 1 − 1/e of the best subset's log det, here found by trying all."""
    rng = np.random.default_rng(seed)
    features = rng.standard_t(2, size=(10, 3)).astype(np.float32)
    picks = pick(features, np.ones(10, bool), nothing_known(3), lam, num_picks=3, block=4, mesh=mesh_of((1, 1, 1)))

    def gain(rows: Any) -> float:
        phi = features[list(rows)].astype(np.float64)
        return float(np.linalg.slogdet(np.eye(3) + phi.T @ phi / lam)[1])

    best = max(gain(subset) for subset in itertools.combinations(range(10), 3))
    assert (1 - 1 / np.e) * best - 1e-6 <= gain(picks.rows) <= best + 1e-6
    assert abs(gain(picks.rows) - float(information_gain(jnp.asarray(picks.scores)))) < 1e-4 * (1 + best)


# ----------------------------------------------------------------------------------------------------- posterior


def test_information_gain_is_the_difference_of_log_determinants() -> None:
    features, _, labelled, reference = large_pool()
    before = LAM * np.eye(features.shape[1]) + labelled.astype(np.float64).T @ labelled
    picked = features[reference.rows].astype(np.float64)
    expected = np.linalg.slogdet(before + picked.T @ picked)[1] - np.linalg.slogdet(before)[1]
    assert float(information_gain(jnp.asarray(reference.scores, jnp.float32))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_posterior_is_the_inverse(lam: float) -> None:
    """With empty slots in between, which hold anything, and λ traced."""
    rng = np.random.default_rng(2)
    known = rng.normal(size=(30, 50)).astype(np.float32)
    filled = rng.random(30) < 0.6
    known[~filled] = np.nan
    w = np.asarray(jax.jit(condition)(known, filled, lam))
    v = lam * np.eye(50) + known[filled].astype(np.float64).T @ known[filled]
    expected = np.linalg.inv(v)
    np.testing.assert_allclose(np.eye(50) / lam - w.T.astype(np.float64) @ w, expected, atol=2e-6 / lam)
    assert not w[~filled].any()

    features = rng.normal(size=(200, 50)).astype(np.float32)
    exact = np.einsum("nd,de,ne->n", features.astype(np.float64), expected, features)
    np.testing.assert_allclose(np.asarray(jax.jit(variances)(features, w, lam)), exact, rtol=1e-4)


def test_variances_without_labels() -> None:
    features = np.random.default_rng(3).normal(size=(20, 8)).astype(np.float32)
    none = condition(jnp.zeros((0, 8)), jnp.zeros(0, bool), 2.0)
    assert none.shape == (0, 8)
    np.testing.assert_allclose(variances(jnp.asarray(features), none, 2.0), (features**2).sum(1) / 2, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_activedpo_inside_a_larger_program(shape: tuple[int, int, int]) -> None:
    """Features, posterior and picks in one jit, as in a fused round, with λ and the labels traced."""
    rng = np.random.default_rng(4)
    raw, known = rng.normal(size=(100, 16)).astype(np.float32), rng.choice(100, 10, replace=False)
    available = np.ones(100, bool)
    available[known] = False

    @jax.jit
    def program(raw: jax.Array, known: jax.Array, lam: jax.Array) -> Picks:
        features = raw / jnp.linalg.norm(raw, axis=1, keepdims=True)
        w = condition(features[known], known >= 0, lam)
        left = jnp.ones(100, bool).at[known].set(False)
        evidence = strategies.Evidence(features=features, posterior=w, lam=lam)
        select = strategies.get("activedpo").select
        return select(evidence, left, jax.random.key(0), 8, 4, mesh_of(shape))

    features = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    expected = dense_greedy(features, available, features[known], 0.3, 8)
    assert np.asarray(program(raw, known, jnp.float32(0.3)).rows).tolist() == expected.rows.tolist()


def test_activedpo_says_what_it_misses() -> None:
    with pytest.raises(ValueError, match="needs the evidence `features`"):
        strategies.get("activedpo").select(
            strategies.Evidence(), jnp.ones(4, bool), jax.random.key(0), 2, 4, mesh_of((1, 1, 1))
        )


def draw(key: jax.Array, available: Any, num_picks: int, shape: tuple[int, int, int] = (1, 1, 1)) -> Picks:
    select = strategies.get("random").select
    return select(strategies.Evidence(), jnp.asarray(available), key, num_picks, 4, mesh_of(shape))


def uniformity(rows: np.ndarray, choices: np.ndarray) -> tuple[float, float]:
    """p-values of "every row is in the batch as often" and of "every ordered pair comes first as often"."""
    draws, k = rows.shape
    n = len(choices)
    counts = np.array([(rows == c).sum() for c in choices])
    # Without replacement, counts vary by less than multinomial ones: (1 − k/n) n/(n−1).
    statistic = ((counts - draws * k / n) ** 2 / (draws * k / n)).sum() * (n - 1) / (n - k)
    first = np.searchsorted(choices, rows[:, 0]) * n + np.searchsorted(choices, rows[:, 1])
    pairs = np.bincount(first, minlength=n * n).reshape(n, n)[~np.eye(n, dtype=bool)]
    return float(scipy.stats.chi2.sf(statistic, n - 1)), float(scipy.stats.chisquare(pairs).pvalue)


def test_random_is_uniform_without_replacement() -> None:
    available = np.random.default_rng(5).permutation(np.arange(30) < 20)
    choices = np.flatnonzero(available)
    keys = jax.random.split(jax.random.key(11), 8_000)
    picks = jax.jit(jax.vmap(lambda key: draw(key, available, 5)))(keys)
    rows = np.asarray(picks.rows)
    assert available[rows].all() and (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()
    assert not np.asarray(picks.scores).any()
    included, ordered = uniformity(rows, choices)
    assert included > 1e-3 and ordered > 1e-3
    # The same test finds out a sampler that drops an eighth of one row's batches, and one that sorts its picks.
    unfair = rows[~((rows == choices[4]).any(axis=1) & (np.arange(len(rows)) % 8 == 0))]
    assert uniformity(unfair, choices)[0] < 1e-3
    assert uniformity(np.sort(rows, axis=1), choices)[1] < 1e-3


def test_random_is_the_same_on_any_mesh_and_padding() -> None:
    available = np.random.default_rng(6).random(1_000) < 0.7
    expected = np.asarray(draw(jax.random.key(3), available, 40).rows).tolist()
    for shape in SHAPES[1:]:
        mesh = mesh_of(shape)
        sharded = jax.device_put(available, NamedSharding(mesh, P(mesh.axis_names)))
        program = jax.jit(lambda key, available, shape=shape: draw(key, available, 40, shape))
        assert np.asarray(program(jax.random.key(3), sharded).rows).tolist() == expected
    padded = np.pad(available, (0, 24))
    assert np.asarray(draw(jax.random.key(3), padded, 40).rows).tolist() == expected
    assert np.asarray(draw(jax.random.key(4), available, 40).rows).tolist() != expected


def test_random_runs_out() -> None:
    rows = np.asarray(draw(jax.random.key(0), [False, True, True], 5).rows).tolist()
    assert sorted(rows[:2]) == [1, 2] and rows[2:] == [-1, -1, -1]


def test_strategies_by_name() -> None:
    assert all(strategies.get(name).name == name for name in strategies.STRATEGIES)
    with pytest.raises(ValueError, match="no strategy 'activdpo'; did you mean 'activedpo'?.*random"):
        strategies.get("activdpo")


def raised(features: np.ndarray, available: np.ndarray, lam: float) -> jax.Array:
    return resolved_lam(jnp.asarray(features), jnp.asarray(available), lam)


def log_det(features: np.ndarray, labelled: np.ndarray, rows: np.ndarray, lam: float) -> float:
    phi, known = features[rows].astype(np.float64), labelled.astype(np.float64)
    return float(np.linalg.slogdet(lam * np.eye(features.shape[1]) + known.T @ known + phi.T @ phi)[1])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e4, 1e8]),
    st.sampled_from(["normal", "three responses", "copies"]),
    st.sampled_from([0, 24]),
    st.sampled_from([(1, 1, 1), (8, 1, 1)]),
)
def test_picks_beyond_the_rank_are_valid_and_no_worse_than_random(
    seed: int, lam: float, kind: str, known: int, shape: tuple[int, int, int]
) -> None:
    """More picks than dimensions, down to the last row, from λ = 1e-8: scores fall below the rounding of ‖φ‖²/λ."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((120, 12)).astype(np.float32)
    if kind == "three responses":  # φ02 = φ01 + φ12
        features[2::3] = features[0::3] + features[1::3]
    elif kind == "copies":
        features = features[np.arange(120) % 10]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labelled = features[rng.choice(120, known)]
    available = np.ones(120, bool)
    used = float(raised(features, available, lam))
    posterior = np.asarray(condition(jnp.asarray(labelled), jnp.ones(known, bool), used))
    for count in (60, 120):
        picks = pick(features, available, posterior, used, num_picks=count, block=16, mesh=mesh_of(shape))
        rows = np.asarray(picks.rows)
        assert len(set(rows.tolist())) == count and rows.min() >= 0 and rows.max() < 120
        assert np.all(np.isfinite(picks.scores)) and np.all(np.asarray(picks.scores) >= 0)
        random = [log_det(features, labelled, rng.choice(120, count, replace=False), lam) for _ in range(3)]
        gain = log_det(features, labelled, rows, lam)
        assert gain >= max(random) - 1e-6 * abs(gain) - 1e-6


@pytest.mark.parametrize("lam", [1e-8, 1e-6, 1.0])
def test_picks_stay_valid_even_where_lam_is_not_raised(lam: float) -> None:
    """Rows of W that would be noise are zero, and so are their scores."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 8)).astype(np.float32)
    picks = pick(features, np.ones(300, bool), nothing_known(8), lam, num_picks=200, block=64, mesh=mesh_of((8, 1, 1)))
    assert len(set(np.asarray(picks.rows).tolist())) == 200 and np.min(picks.rows) >= 0
    assert np.all(np.isfinite(picks.scores))


def test_lam_is_raised_only_where_float32_needs_it() -> None:
    features = np.array([[2.0, 0.0], [0.0, 100.0]], np.float32)
    available = np.array([True, False])
    assert float(raised(features, available, 0.3)) == np.float32(0.3)
    assert float(raised(features, available, 1e-8)) == 4 * FLOOR


def test_the_posterior_of_more_pairs_than_dimensions_is_finite() -> None:
    """λ so small that float32 has no Cholesky factor: W is built row by row, and V⁻¹ is that of float64."""
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((40, 8)).astype(np.float32)
    lam = 1e-3
    w = np.asarray(condition(jnp.asarray(phi), jnp.ones(40, bool), lam), np.float64)
    inverse = np.linalg.inv(lam * np.eye(8) + phi.T.astype(np.float64) @ phi)
    np.testing.assert_allclose(np.eye(8) / lam - w.T @ w, inverse, atol=2e-6 * 8 / lam)
