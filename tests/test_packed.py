"""Packed batches give what padded ones give: log-probs, gradients, features, states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax.data.groups import Groups
from activedpo_jax.data.packing import Axis, Packing, Tier
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


def both(**changes: object) -> tuple[tuple[Decoder, Decoder], Params, Lora]:
    """A decoder of packed groups and one of padded groups."""
    decoder, params, lora = tiny.model(**changes)
    return (decoder.clone(packing=PACKING), decoder), params, lora


VARIANTS: list[dict[str, object]] = [{"remat": "dots"}, {"logits_chunk": 4}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_log_probs_and_their_gradient(changes: dict[str, object]) -> None:
    decoders, params, lora = both(**changes)

    def total(lora: Lora, decoder: Decoder) -> tuple[jax.Array, jax.Array]:
        logps = response_logps(decoder, params, lora, some_groups())
        return jnp.sum(logps * jnp.array([1.0, -0.7])), logps

    grad = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    (found, logps), (expected, expected_logps) = (grad(lora, decoder) for decoder in decoders)
    assert tiny.relative_error(logps, expected_logps) < 2e-6
    assert logps[2, 0] == logps[4, 0] == 0
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert tiny.relative_error(x, y) < 1e-5


def test_the_gradient_of_all_weights() -> None:
    decoders, params, _ = both()

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def grad(params: Params, decoder: Decoder) -> jax.Array:
        return jnp.sum(decoder.apply({"params": params}, some_groups(), None, True))  # type: ignore[arg-type]

    found, expected = (jax.tree.leaves(grad(params, decoder)) for decoder in decoders)
    for x, y in zip(found, expected, strict=True):
        assert tiny.relative_error(x, y) < 1e-5


@pytest.mark.parametrize("normalisation", ["response", "none"])
def test_features(normalisation: str) -> None:
    decoders, params, lora = both()
    features = jax.jit(pair_features, static_argnums=(0, 4))
    spec, seed = FeatureSpec(64, normalisation), jnp.uint32(3)
    found, expected = (features(decoder, params, lora, some_groups(), spec, seed) for decoder in decoders)
    assert tiny.relative_error(found, expected) < 1e-5


def test_a_missing_response_has_no_gradient() -> None:
    decoders, params, lora = both()
    features = jax.jit(response_features, static_argnums=(0, 4))
    found = np.asarray(features(decoders[0], params, lora, some_groups(), 64, jnp.uint32(3)))
    assert np.array_equal(np.any(found != 0, axis=-1), some_groups().response_len > 0)


def test_a_packing_of_another_batch_is_refused() -> None:
    (decoder, _), params, lora = both()
    with pytest.raises(ValueError, match="3 groups do not make a batch packed for 5"):
        response_logps(decoder, params, lora, Groups(*(x[:3] for x in some_groups())))


def test_last_states() -> None:
    decoders, params, lora = both()
    states = jax.jit(
        lambda decoder: decoder.apply({"params": params, "lora": lora}, some_groups(), method="states"),
        static_argnums=0,
    )
    found, expected = (states(decoder) for decoder in decoders)
    assert tiny.relative_error(found, expected) < 2e-6
