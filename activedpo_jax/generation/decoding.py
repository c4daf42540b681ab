"""Responses from a decoder, token by token: one prefill per prompt, then a loop that ends when all responses have.

One compiled program for each spec and bucket.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout
from activedpo_jax.generation.sampling import Sampling, draw
from activedpo_jax.models.decoder import Cache, Decoder, KeysValues, Params
from activedpo_jax.models.lora import Lora


@dataclasses.dataclass(frozen=True)
class DecodingSpec:
    """What a program that samples is compiled for."""

    decoder: Decoder  # unrolled
    sampling: Sampling
    stop: tuple[int, ...]  # the tokens that end a response, and belong to it; none: all responses have R tokens
    length: int  # R
    mesh: Mesh

    def __post_init__(self) -> None:
        if not self.decoder.unrolled:
            raise ValueError("sampling needs decoder.clone(unrolled=True), and its weights as `unstack` gives them")


class Requests(NamedTuple):
    """A batch of G prompts, with m responses asked for to each."""

    prompt_ids: Any  # [G, P] int32, padded on the left
    prompt_len: Any  # [G] int32, at least 1
    seeds: Any  # [G] uint32
    samples: Any  # [G, m] int32: the number of each response among its prompt's samples; −1: not asked for


class Responses(NamedTuple):
    """The responses to a batch of requests."""

    tokens: jax.Array  # [G, m, R] int32, 0 after the end
    length: jax.Array  # [G, m] int32, the stop token included; 0 where not asked for
    ended: jax.Array  # [G, m] bool: by a stop token, not by having R tokens
    logps: jax.Array  # [G, m, R] float32: log π(token | before) under the model itself, 0 after the end


class _State(NamedTuple):
    place: jax.Array  # how many tokens the running responses have
    last: jax.Array  # [G, m], the latest token of each
    running: jax.Array  # [G, m] bool
    responses: Responses
    cache: Cache


@functools.partial(jax.jit, static_argnums=0)
def respond(spec: DecodingSpec, params: Params, lora: Lora | None, requests: Requests) -> Responses:
    """Samples every request's responses.

    A response depends on its prompt, its seed, its number among the samples, and the spec's `sampling` and `stop`
    alone: it is the same in another batch, bucket or mesh, as far as the logits are the same numbers.

    Args:
      params, lora: as `models.decoder.unstack` returns them; no LoRA: the base model.
    """
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    decoder, length = spec.decoder, spec.length
    batch = functools.partial(_on_mesh, spec.mesh)
    prompt_ids, prompt_len, seeds, samples = (batch(jnp.asarray(x)) for x in requests)
    groups, m = samples.shape
    stop = jnp.asarray(spec.stop, jnp.int32)

    logits: Any
    prompt: Any
    logits, prompt = decoder.apply(variables, prompt_ids, prompt_len, method="prefill")
    empty = Responses(
        tokens=batch(jnp.zeros((groups, m, length), jnp.int32)),
        length=batch(jnp.zeros((groups, m), jnp.int32)),
        ended=batch(jnp.zeros((groups, m), bool)),
        logps=batch(jnp.zeros((groups, m, length), jnp.float32)),
    )

    def append(logits: jax.Array, place: Any, running: Any, so_far: Responses) -> tuple[Any, Any, Responses]:
        token = jnp.where(running, draw(spec.sampling, logits, seeds, samples, place), 0)
        logp = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        ends = running & jnp.any(token[..., None] == stop, axis=-1)
        responses = Responses(
            tokens=jax.lax.dynamic_update_index_in_dim(so_far.tokens, token, place, 2),
            length=so_far.length + running,
            ended=so_far.ended | ends,
            logps=jax.lax.dynamic_update_index_in_dim(so_far.logps, jnp.where(running, logp, 0.0), place, 2),
        )
        return token, running & ~ends, responses

    def step(state: _State) -> _State:
        logits: Any
        cache: Any
        logits, cache = decoder.apply(
            variables, state.last, state.place - 1, prompt_len, prompt, state.cache, method="decode"
        )
        last, running, responses = append(logits, state.place, state.running, state.responses)
        return _State(state.place + 1, last, running, responses, cache)

    def unfinished(state: _State) -> jax.Array:
        return (state.place < length) & jnp.any(state.running)

    start = jnp.int32(0)
    logits = jnp.broadcast_to(logits[:, None], (groups, m, logits.shape[-1]))
    last, running, responses = append(logits, start, samples >= 0, empty)
    cache = [_empty_cache(kv, m, length, spec.mesh) for kv in prompt]
    return jax.lax.while_loop(unfinished, step, _State(start + 1, last, running, responses, cache)).responses


def _on_mesh(mesh: Mesh, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, layout.fit(mesh, P(layout.BATCH_AXES), x.shape))


def _empty_cache(prompt: KeysValues, m: int, length: int, mesh: Mesh) -> KeysValues:
    """Room for the keys [G, K·m, Dh, R] and values [G, K·m, R, Dh] of the responses, cut like the weights."""
    groups, heads, dim, _ = prompt[0].shape

    def zeros(*shape: int) -> jax.Array:
        place = layout.fit(mesh, P(layout.BATCH_AXES, "tensor"), shape)
        return jax.lax.with_sharding_constraint(jnp.zeros(shape, prompt[0].dtype), place)

    return zeros(groups, heads * m, dim, length), zeros(groups, heads * m, length, dim)
