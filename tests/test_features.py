"""Probe features against per-example gradients, and their independence of everything that is not the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.gradients import (
    FeatureSpec,
    normalise,
    pair_features,
    reference_gradients,
    response_features,
    sketch_gradients,
)
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora, init_lora
from tests import tiny

DIM, SEED = 256, jnp.uint32(5)
BOUND = 1e-5


def reference(decoder: Decoder, params: Params, lora: Lora, batch: Groups) -> np.ndarray:
    compute = jax.jit(lambda b: sketch_gradients(reference_gradients(decoder, params, lora, b), DIM, SEED))
    return np.array(compute(batch))


def responses_of(decoder: Decoder, params: Params, lora: Lora, batch: Groups) -> np.ndarray:
    return np.array(jax.jit(lambda b: response_features(decoder, params, lora, b, DIM, SEED))(batch))


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("remat", ["none", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dots", "full"))])
def test_equal_per_example_gradients(m: int, remat: str) -> None:
    decoder, params, lora = tiny.model(remat=remat)
    batch = tiny.groups(0, 4, m)
    got = responses_of(decoder, params, lora, batch)
    assert tiny.relative_error(got, reference(decoder, params, lora, batch)) < BOUND


def test_equal_per_example_gradients_at_initialisation() -> None:
    decoder, params, _ = tiny.model()
    lora = init_lora(decoder.config, decoder.lora, jax.random.key(1))
    batch = tiny.groups(0, 4, 2)
    gradients = jax.jit(lambda b: reference_gradients(decoder, params, lora, b))(batch)
    assert all(not np.any(module["a"]) for module in gradients["layers"].values())  # B = 0: dead, exactly
    got = responses_of(decoder, params, lora, batch)
    assert tiny.relative_error(got, reference(decoder, params, lora, batch)) < BOUND


def test_a_subset_of_target_modules() -> None:
    decoder, params, lora = tiny.model()
    lora = {"layers": {name: lora["layers"][name] for name in ("v_proj", "down_proj")}}
    batch = tiny.groups(0, 4, 2)
    got = responses_of(decoder, params, lora, batch)
    assert tiny.relative_error(got, reference(decoder, params, lora, batch)) < BOUND


@pytest.mark.parametrize("normalisation", ["response", "none"])
@pytest.mark.parametrize("m", [2, 3])
def test_pair_features_are_differences(normalisation: str, m: int) -> None:
    decoder, params, lora = tiny.model()
    batch = tiny.groups(0, 4, m)
    responses = reference(decoder, params, lora, batch)
    if normalisation == "response":
        responses /= np.linalg.norm(responses, axis=-1, keepdims=True)
    pairs = [(0, 1)] if m == 2 else [(0, 1), (0, 2), (1, 2)]
    expected = np.stack([responses[:, i] - responses[:, j] for i, j in pairs], axis=1)
    spec = FeatureSpec(DIM, normalisation)
    got = jax.jit(lambda b: pair_features(decoder, params, lora, b, spec, SEED))(batch)
    assert tiny.relative_error(got, expected) < BOUND


@pytest.mark.parametrize("normalisation", ["response", pytest.param("none", marks=pytest.mark.slow)])
def test_independent_of_batch_padding_and_bucket(normalisation: str) -> None:
    decoder, params, lora = tiny.model()
    spec = FeatureSpec(DIM, normalisation)
    compute = jax.jit(lambda batch: pair_features(decoder, params, lora, batch, spec, SEED))
    batch = tiny.groups(0, 6, 2)
    expected = np.asarray(compute(batch))
    one_by_one = [compute(Groups(*(x[i : i + 1] for x in batch))) for i in range(6)]
    assert tiny.relative_error(np.concatenate(one_by_one), expected) < BOUND
    backwards = compute(Groups(*(x[::-1] for x in batch)))
    assert tiny.relative_error(np.asarray(backwards)[::-1], expected) < BOUND
    for prompt, response in [(7, 9), (12, 6), (16, 16)]:
        assert tiny.relative_error(compute(tiny.widen(batch, prompt, response)), expected) < BOUND


@pytest.mark.parametrize("chunk", [1, 8, 10_000])
def test_independent_of_how_logits_are_chunked(chunk: int) -> None:
    decoder, params, lora = tiny.model()
    batch = tiny.groups(0, 4, 2)
    expected = responses_of(decoder, params, lora, batch)
    got = responses_of(decoder.clone(logits_chunk=chunk), params, lora, batch)
    assert tiny.relative_error(got, expected) < BOUND


def test_missing_responses_are_zero() -> None:
    decoder, params, lora = tiny.model()
    batch = tiny.groups(0, 3, 2)
    batch.response_len[1, 1] = 0
    features = np.asarray(normalise(jnp.asarray(responses_of(decoder, params, lora, batch))))
    norms = np.linalg.norm(features, axis=-1)
    expected = np.ones((3, 2))
    expected[1, 1] = 0
    assert np.allclose(norms, expected, atol=1e-6)


def test_prompt_is_computed_once_for_all_responses() -> None:
    """The forward products on prompt tokens carry no axis of responses: that is what mapping over responses buys."""
    decoder, params, lora = tiny.model()
    batch = tiny.groups(0, 5, 3)
    jaxpr = jax.make_jaxpr(lambda b: response_features(decoder, params, lora, b, DIM, SEED))(batch)
    text = str(jaxpr)
    width, hidden = batch.prompt_ids.shape[1], decoder.config.intermediate_size
    assert f"f32[5,{width},{hidden}]" in text  # gate of the prompt, unmapped


def test_unknown_normalisation_names_the_choices() -> None:
    with pytest.raises(ValueError, match="response.*none"):
        FeatureSpec(8, "pair")
