"""Selection from features on the host or on disk: the picks of `greedy` and of the dense loop, and little reading."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from activedpo_jax.selection.greedy import Picks, greedy
from activedpo_jax.selection.posterior import condition
from activedpo_jax.selection.streamed import streamed
from tests.test_selection import (
    INTEGER_ROWS,
    LAM,
    MASKS,
    PICKS,
    D,
    K,
    dense_greedy,
    large_pool,
    mesh_of,
    nothing_known,
)

SHAPES = [(1, 1, 1), (2, 2, 2)]


def pick(features: Any, available: Any, posterior: Any, lam: float, **static: Any) -> Picks:
    return jax.tree.map(np.asarray, streamed(features, available, posterior, lam, **static))


class Counted(np.memmap):
    """An array on disk that counts the rows read from it."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Counted.read += np.size(index)
        return np.asarray(found)


@pytest.mark.parametrize(("shape", "block"), [((1, 1, 1), 300), ((2, 2, 2), 64)])
def test_picks_are_those_of_the_dense_loop_and_few_rows_are_read(
    shape: tuple[int, int, int], block: int, tmp_path: pathlib.Path
) -> None:
    features, available, labelled, reference = large_pool()
    features.tofile(tmp_path / "features")
    stored = Counted(tmp_path / "features", np.float32, "r", shape=features.shape)
    posterior = np.asarray(condition(jnp.asarray(labelled), jnp.ones(len(labelled), bool), LAM))
    Counted.read = 0
    picks = pick(stored, available, posterior, LAM, num_picks=PICKS, block=block, mesh=mesh_of(shape))
    assert picks.rows.tolist() == reference.rows.tolist()
    np.testing.assert_allclose(picks.scores, reference.scores, rtol=2e-5)
    assert len(features) <= Counted.read < 1.3 * len(features)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ties_wider_than_the_blocks_go_to_the_lowest_row(dtype: Any, shape: tuple[int, int, int]) -> None:
    """203 rows, which blocks do not divide, of which every pick leaves all, none or a third of the others tied."""
    n, dim, k = 203, 257, 40
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, dim)) / np.sqrt(dim)
    pools = {
        "equal": np.tile(rows[0], (n, 1)),
        "zero": np.zeros((n, dim)),
        "three": rows[np.arange(n) % 3] * np.array([0.5, 2.0, 1.0])[np.arange(n) % 3, None],
        "orthogonal": np.eye(dim)[rng.permutation(dim)[:n]],
    }
    available = np.arange(n) % 5 != 0
    for features in pools.values():
        stored = features.astype(dtype)
        picks = pick(stored, available, nothing_known(dim), 0.01, num_picks=k, block=3, mesh=mesh_of(shape))
        expected = dense_greedy(stored.astype(np.float32), available, nothing_known(dim), 0.01, k)
        assert picks.rows.tolist() == expected.rows.tolist()


@settings(max_examples=60, deadline=None)
@given(
    features=INTEGER_ROWS,
    available=MASKS,
    known=MASKS,
    lam=st.sampled_from([0.25, 1.0, 4.0]),
    placement=st.sampled_from([((1, 1, 1), 2), ((1, 1, 1), 24), ((2, 2, 2), 1)]),
)
def test_small_pools_of_ties(
    features: np.ndarray, available: np.ndarray, known: np.ndarray, lam: float, placement: Any
) -> None:
    """Those of the dense loop, and those of `greedy` also where float32 cannot tell rows apart."""
    posterior = jax.jit(condition)(features, known, lam)
    static = {"num_picks": K, "block": placement[1], "mesh": mesh_of(placement[0])}
    picks = pick(features, available, posterior, lam, **static)
    expected = dense_greedy(features, available, features[known], lam, K)
    assume(expected.margin > 4)
    resident = greedy(features, available, posterior, lam, **static)
    assert picks.rows.tolist() == np.asarray(resident.rows).tolist()
    assert picks.rows.tolist() == expected.rows.tolist() + [-1] * (K - len(expected.rows))
    np.testing.assert_allclose(picks.scores, resident.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_too_few_rows_and_numbers_that_are_not_finite(shape: tuple[int, int, int]) -> None:
    features = np.zeros((20, D), np.float32)
    features[3, 0] = 1.0
    available = np.isin(np.arange(20), [3, 7, 15])
    features[~available] = np.nan
    static: dict[str, Any] = {"num_picks": 6, "block": 2, "mesh": mesh_of(shape)}
    picks = pick(features, available, nothing_known(D), 1.0, **static)
    assert picks.rows.tolist() == [3, 7, 15, -1, -1, -1]
    assert picks.scores.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    picks = pick(features, np.ones(20, bool), nothing_known(D), 1.0, **static)
    assert picks.rows.tolist() == [-1] * 6 and np.isnan(picks.scores).all()


def test_bad_arguments_are_named() -> None:
    features, available = np.zeros((5, 4), np.float64), np.ones(5, bool)
    with pytest.raises(ValueError, match=r"features must be .* got \(5, 4\) float64"):
        streamed(features, available, nothing_known(4), 1.0, num_picks=2, block=4, mesh=mesh_of((1, 1, 1)))
