"""Means and widths of rewards against dense algebra in float64, and what computing them takes."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from activedpo_jax.evidence.registry import compute
from activedpo_jax.selection.posterior import FLOOR, condition
from activedpo_jax.selection.strategies import STRATEGIES, conditioned
from activedpo_jax.selection.widths import bounds, pair_vectors, widths
from tests import tiny
from tests.test_evidence import SEED, policy_and_lora, spec
from tests.test_selection import mesh_of

LAM, DIM = 0.3, 24


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_widths_are_those_of_the_dense_inverse(shape: tuple[int, int, int], dtype: Any) -> None:
    """Of both responses, and jointly; 21 rows, which eight devices do not divide."""
    rng = np.random.default_rng(0)
    vectors, known = rng.normal(size=(21, 2, DIM)).astype(dtype), rng.normal(size=(6, DIM)).astype(np.float32)
    vectors[4, 1] = vectors[4, 0]  # nothing to tell apart
    w = condition(jnp.asarray(known), jnp.ones(6, bool), LAM)
    exact, labels = vectors.astype(np.float64), known.astype(np.float64)
    inverse = np.linalg.inv(LAM * np.eye(DIM) + labels.T @ labels)

    @jax.jit
    def program(vectors: jax.Array, w: jax.Array) -> Any:
        mesh = mesh_of(shape)
        return widths(vectors, w, LAM, mesh), widths(pair_vectors(vectors), w, LAM, mesh)

    single, joint = program(vectors, w)
    phi = exact[:, 0] - exact[:, 1]
    np.testing.assert_allclose(single.values, np.sqrt(np.einsum("nid,de,nie->ni", exact, inverse, exact)), rtol=2e-6)
    np.testing.assert_allclose(joint.values, np.sqrt(np.einsum("nd,de,ne->n", phi, inverse, phi)), rtol=2e-6)
    assert np.all(np.asarray(joint.values) <= np.asarray(single.values).sum(axis=1) * (1 + 1e-6))
    assert joint.values[4] == 0
    known_to = np.asarray(single.tolerance) / np.asarray(single.values)
    assert known_to.min() > 1e-7 and known_to.max() < 1e-5


def test_bounds_are_symmetric() -> None:
    low, high = bounds(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]), 3.0)
    assert low.tolist() == [-0.5, -8.0] and high.tolist() == [2.5, 4.0]


def test_a_design_of_both_responses_is_that_of_their_differences() -> None:
    rng = np.random.default_rng(1)
    vectors, known = (
        rng.normal(size=(9, 2, DIM)).astype(np.float32),
        jnp.asarray(rng.normal(size=(3, DIM)), jnp.float32),
    )
    available, counts = jnp.arange(9) != 2, jnp.array([True, False, True])
    phi = vectors[:, 0] - vectors[:, 1]
    both, pairs = (
        [conditioned(STRATEGIES[name], {field: x}, available, lam, known, counts) for lam in (LAM, 1e-9)]
        for name, field, x in (("dts", "response_features", vectors), ("deltaucb", "features", phi))
    )
    np.testing.assert_array_equal(both[0]["posterior"], pairs[0]["posterior"])
    assert float(both[0]["lam"]) == float(pairs[0]["lam"]) == np.float32(LAM)
    # The other λ is too small for float32, and raised.
    longest = np.linalg.norm(vectors, axis=2).sum(axis=1)[np.asarray(available)].max() ** 2
    assert float(both[1]["lam"]) == pytest.approx(FLOOR * longest, rel=1e-6)
    assert float(both[1]["lam"]) >= float(pairs[1]["lam"]) > 1e-9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["dts", "deltaucb"])
def test_widths_need_little_beside_the_features(name: str, dtype: Any) -> None:
    """200,000 × 2 × 8,192 on eight devices, with the design; compiled and not run."""
    n, dim, labelled, mesh, strategy = 200_000, 8_192, 200, mesh_of((2, 2, 2)), STRATEGIES[name]
    by_rows, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    shape = (n, 2, dim) if name == "dts" else (n, dim)

    def program(vectors: jax.Array, available: jax.Array, known: jax.Array) -> Any:
        assert strategy.design is not None
        seen = conditioned(strategy, {strategy.design: vectors}, available, LAM, known, jnp.ones(labelled, bool))
        return widths(vectors, seen["posterior"], seen["lam"], mesh)

    compiled = (
        jax.jit(program)
        .lower(
            jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows),
            jax.ShapeDtypeStruct((n,), jnp.bool_, sharding=by_rows),
            jax.ShapeDtypeStruct((labelled, dim), dtype, sharding=whole),
        )
        .compile()
    )
    memory, features = compiled.memory_analysis(), math.prod(shape) * jnp.dtype(dtype).itemsize // mesh.size
    assert memory is not None and memory.argument_size_in_bytes >= features
    assert memory.temp_size_in_bytes < 0.1 * features
    gathered = re.findall(r"= \S*\[(\d+)(?:,2)?,8192\]\S* all-gather", compiled.as_text() or "")
    assert all(int(rows) <= labelled for rows in gathered)


def test_gradients_of_both_responses_cost_what_those_of_pairs_do() -> None:
    """Backward passes are those of `features`: as many FLOPs, where gradients computed twice would be twice as many."""
    batch = tiny.groups(0, 4, 3)

    def flops(*names: str) -> float:
        program = jax.jit(compute, static_argnums=(0, 1))
        cost = program.lower(names, spec(), *policy_and_lora(), batch, SEED).compile().cost_analysis()
        assert cost is not None
        return float(cost["flops"])

    assert flops("response_features") < 1.01 * flops("features")
