"""Tiny random models and batches that the tests share."""

import functools
from typing import Any

import jax
import numpy as np

from activedpo_jax.data.groups import Groups
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.decoder import Decoder, Params, init_params
from activedpo_jax.models.lora import Lora, init_lora

MODEL = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
LORA = LoraConfig(rank=4, alpha=8.0)


@functools.cache
def model(seed: int = 0, **changes: Any) -> tuple[Decoder, Params, Lora]:
    """A decoder with random weights, and an adapter whose A and B are both random, as after some training."""
    decoder = Decoder(MODEL, LORA).clone(**changes)
    keys = jax.random.split(jax.random.key(seed), 3)
    # Larger than the usual 0.02, so that attention and gates leave their linear range, but not so far that a softmax
    # saturates: then gradients are differences of nearly equal things, and float32 has little left of them.
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 and x.shape[-1] > 1 else x, init_params(decoder, keys[0]))
    lora = init_lora(decoder.config, decoder.lora, keys[1])
    noise = jax.tree.unflatten(jax.tree.structure(lora), list(jax.random.split(keys[2], len(jax.tree.leaves(lora)))))
    return decoder, params, jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), lora, noise)


def groups(seed: int, count: int, m: int, prompt: int = 7, response: int = 6) -> Groups:
    """Random groups of all lengths that the shape has room for; garbage stands in the padding."""
    rng = np.random.default_rng(seed)
    vocab = MODEL.vocab_size
    return Groups(
        rng.integers(0, vocab, (count, prompt), np.int32),
        rng.integers(1, prompt + 1, count, np.int32),
        rng.integers(0, vocab, (count, m, response), np.int32),
        rng.integers(1, response + 1, (count, m), np.int32),
    )


def widen(batch: Groups, prompt: int, response: int, seed: int = 0) -> Groups:
    """The same groups in a larger bucket, with other garbage in the padding."""
    rng = np.random.default_rng(seed)
    more_prompt = prompt - batch.prompt_ids.shape[1]
    more_response = response - batch.response_ids.shape[2]
    left = rng.integers(0, MODEL.vocab_size, (len(batch.prompt_len), more_prompt), np.int32)
    right = rng.integers(0, MODEL.vocab_size, (*batch.response_len.shape, more_response), np.int32)
    return Groups(
        np.concatenate([left, batch.prompt_ids], axis=1),
        batch.prompt_len,
        np.concatenate([batch.response_ids, right], axis=2),
        batch.response_len,
    )


def relative_error(x: object, reference: object) -> float:
    """Largest difference, as a share of the reference's largest entry."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(x - reference).max() / np.abs(reference).max())
