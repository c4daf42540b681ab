"""Features in bfloat16: the picks are those of the rounded numbers, and selection needs little beside the features."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.evidence.registry import EMBEDDINGS, SKETCHES
from activedpo_jax.selection import strategies
from activedpo_jax.selection.posterior import condition, resolved_lam
from activedpo_jax.selection.strategies import STRATEGIES
from tests.test_selection import LAM, PICKS, SHAPES, dense_greedy, large_pool, mesh_of, pick

SQUARES = {"dopt": 10, "transductive": 3}
BY_VECTORS = sorted(
    name
    for name, strategy in STRATEGIES.items()
    if strategy.needs and strategy.needs <= SKETCHES | EMBEDDINGS and "response_features" not in strategy.needs
)


@pytest.mark.parametrize("shape", SHAPES)
def test_picks_are_those_of_the_dense_loop_on_the_rounded_features(shape: tuple[int, int, int]) -> None:
    """The first 5,000 rows of the pool: duplicates stay duplicates, and tie."""
    features, available, labelled, _ = large_pool()
    stored = features[:5000].astype(ml_dtypes.bfloat16)
    rounded = stored.astype(np.float32)
    reference = dense_greedy(rounded, available[:5000], labelled, LAM, PICKS)
    assert (reference.ties > 1).sum() > 2 and reference.margin > 4
    posterior = np.asarray(condition(jnp.asarray(labelled), jnp.ones(len(labelled), bool), LAM))
    by_rows = NamedSharding(mesh_of(shape), P(mesh_of(shape).axis_names))
    placed = jax.device_put(stored, by_rows)
    static: dict[str, Any] = {"num_picks": PICKS, "block": 16, "mesh": mesh_of(shape)}
    picks = pick(placed, available[:5000], posterior, LAM, **static)
    assert picks.rows.tolist() == reference.rows.tolist()
    np.testing.assert_allclose(picks.scores, reference.scores, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(40, 1), (40, 16), (203, 3)]), st.sampled_from([(1, 1, 1), (2, 2, 2)])
)
def test_picks_of_random_rounded_features(seed: int, size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    stored = (rng.normal(size=(size[0], 33)) * rng.gamma(3.0, size=(size[0], 1))).astype(ml_dtypes.bfloat16)
    rounded, known = stored.astype(np.float32), rng.random(size[0]) < 0.2
    reference = dense_greedy(rounded, ~known, rounded[known], 0.3, 20)
    assume(reference.margin > 4)
    posterior = np.asarray(jax.jit(condition)(stored, known, 0.3))
    assert posterior.dtype == np.float32
    static: dict[str, Any] = {"num_picks": 20, "block": size[1], "mesh": mesh_of(shape)}
    assert pick(stored, ~known, posterior, 0.3, **static).rows.tolist() == reference.rows.tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", BY_VECTORS)
def test_strategies_see_the_rounded_numbers(name: str, shape: tuple[int, int, int]) -> None:
    """What float32 arithmetic makes of them, bit for bit where it is done in the same order."""
    rng = np.random.default_rng(0)
    stored = (rng.normal(size=(400, 65)) * rng.gamma(3.0, size=(400, 1))).astype(ml_dtypes.bfloat16)
    available = np.arange(400) % 7 != 0
    strategy, mesh = STRATEGIES[name], mesh_of(shape)

    @jax.jit
    def program(vectors: jax.Array, available: jax.Array) -> Any:
        evidence = strategies.Evidence(dict.fromkeys(strategy.needs, vectors))
        known = vectors[:9]
        evidence = strategies.conditioned(strategy, evidence, available, LAM, known, jnp.ones(9, bool))
        return strategy.select(evidence, available, jax.random.key(0), 50, 16, mesh)

    found, expected = (jax.device_get(program(x, available)) for x in (stored, stored.astype(np.float32)))
    assert found.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    raised = float(resolved_lam(jnp.asarray(stored), jnp.asarray(available), 1e-9))
    assert raised == float(resolved_lam(jnp.asarray(stored, jnp.float32), jnp.asarray(available), 1e-9))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", BY_VECTORS)
def test_selection_needs_a_tenth_beside_the_features(name: str, dtype: Any, shape: tuple[int, int, int]) -> None:
    """200,000 × 8,192, compiled and not run: nothing of that size is made, padded, gathered or widened.

    Beside that some have matrices of 8,192 × 8,192, whatever the number of rows and devices.
    """
    n, dim, labelled = 200_000, 8_192, 200
    mesh, strategy = mesh_of(shape), STRATEGIES[name]
    by_rows, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())

    def program(vectors: jax.Array, available: jax.Array, known: jax.Array) -> Any:
        evidence = strategies.Evidence(dict.fromkeys(strategy.needs, vectors))
        evidence = strategies.conditioned(strategy, evidence, available, LAM, known, jnp.ones(labelled, bool))
        return strategy.select(evidence, available, jax.random.key(0), PICKS, 1024, mesh)

    compiled = (
        jax.jit(program)
        .lower(
            jax.ShapeDtypeStruct((n, dim), dtype, sharding=by_rows),
            jax.ShapeDtypeStruct((n,), jnp.bool_, sharding=by_rows),
            jax.ShapeDtypeStruct((labelled, dim), dtype, sharding=whole),
        )
        .compile()
    )
    memory, devices = compiled.memory_analysis(), math.prod(shape)
    features = n * dim * jnp.dtype(dtype).itemsize // devices
    assert memory is not None and memory.argument_size_in_bytes >= features
    assert memory.temp_size_in_bytes < 0.1 * features + SQUARES.get(name, 0) * dim**2 * 4
    gathered = re.findall(r"= \S*\[(\d+),8192\]\S* all-gather", compiled.as_text() or "")
    assert all(int(rows) <= labelled for rows in gathered)
