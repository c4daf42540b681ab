"""Packed batches give what padded ones give: log-probs, gradients, features, states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax.data.groups import Groups
from activedpo_jax.data.packing import Axis, Lengths, Packing, Tier, plan
from activedpo_jax.evidence.gradients import FeatureSpec, pair_features, response_features
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import response_logps
from tests import tiny

PACKING = Packing(
    Axis(24, (Tier(1, 8), Tier(1, 6), Tier(3, 5))),
    Axis(22, (Tier(2, 10), Tier(1, 8), Tier(2, 3))),
)


def some_groups() -> Groups:
    """Five groups, one response missing, the last group empty, with garbage in the padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tiny.MODEL.vocab_size, (5, 8), np.int32), rng.integers(0, 97, (5, 2, 10), np.int32)
    prompt_len, response_len = [3, 8, 2, 6, 1], [[2, 8], [10, 1], [0, 3], [7, 7], [0, 0]]
    return Groups(ids[0], np.array(prompt_len, np.int32), ids[1], np.array(response_len, np.int32))


def both(**changes: object) -> tuple[Decoder, Decoder, Params, Lora]:
    decoder, params, lora = tiny.model(**changes)
    return decoder, decoder.clone(packing=PACKING), params, lora


VARIANTS: list[dict[str, object]] = [{}, {"remat": "dots"}, {"logits_chunk": 4}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_log_probs_and_their_gradient(changes: dict[str, object]) -> None:
    padded, packed, params, lora = both(**changes)
    groups = some_groups()

    def total(lora: Lora, decoder: Decoder) -> jax.Array:
        logps = response_logps(decoder, params, lora, groups)
        return jnp.sum(logps * jnp.array([1.0, -0.7])), logps

    grad = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    (expected, logps), (found, packed_logps) = grad(lora, padded), grad(lora, packed)
    np.testing.assert_allclose(packed_logps, logps, rtol=2e-5, atol=2e-5)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert tiny.relative_error(x, y) < 2e-5


def test_the_gradient_of_all_weights() -> None:
    padded, packed, params, _ = both()
    groups = some_groups()
    grad = jax.jit(
        jax.grad(lambda params, decoder: jnp.sum(decoder.apply({"params": params}, groups, None, True))),
        static_argnums=1,
    )
    for x, y in zip(jax.tree.leaves(grad(params, packed)), jax.tree.leaves(grad(params, padded)), strict=True):
        assert tiny.relative_error(x, y) < 2e-5


def test_features() -> None:
    padded, packed, params, lora = both()
    groups = some_groups()
    features = jax.jit(response_features, static_argnums=(0, 4))
    found, expected = (features(d, params, lora, groups, 64, jnp.uint32(3)) for d in (packed, padded))
    assert tiny.relative_error(found, expected) < 2e-5
    assert np.all(np.asarray(found)[np.asarray(groups.response_len) == 0] == 0)
    spec = FeatureSpec(64, "none")
    pairs = jax.jit(pair_features, static_argnums=(0, 4))
    found, expected = (pairs(d, params, lora, groups, spec, jnp.uint32(3)) for d in (packed, padded))
    assert tiny.relative_error(found, expected) < 2e-5


def test_last_states() -> None:
    padded, packed, params, lora = both()
    states = [d.apply({"params": params, "lora": lora}, some_groups(), method="states") for d in (packed, padded)]
    np.testing.assert_allclose(states[0], states[1], rtol=1e-5, atol=1e-5)
