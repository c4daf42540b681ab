"""Log-probabilities of tokens from hidden states, without ever holding the logits of a whole batch.

A 256k vocabulary costs as much as many layers, and its logits take more memory than all of them; so they are computed
for a few tokens at a time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout


class Chunking(NamedTuple):
    """How the logits of a batch are computed."""

    tokens: int  # about how many tokens' logits a device holds at a time (at least one position of each response)
    softcap: float | None = None
    mesh: Mesh | None = None  # of the program; None: the default device

    def positions(self, groups: int, m: int, length: int) -> int:
        """Of each response in a chunk: a divisor of its length."""
        shards = 1 if self.mesh is None else layout.axis_size(self.mesh, layout.BATCH_AXES)
        if groups % shards == 0:
            groups //= shards
        wanted = max(1, self.tokens // (groups * m))
        return max(s for s in range(1, min(length, wanted) + 1) if length % s == 0)

    def place(self, x: jax.Array, spec: P) -> jax.Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, layout.fit(self.mesh, spec, x.shape))

    def logits(self, states: jax.Array, table: jax.Array) -> jax.Array:
        """[G, m, size, d] → [G, m, size, V], cut along both as far as the mesh does."""
        states = self.place(states, P(layout.BATCH_AXES))
        return self.place(make_logits(states, table, self.softcap), P(layout.BATCH_AXES, None, None, "tensor"))


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[G, m, R, ...] → [R/size, G, m, size, ...]: cut along the tokens, so that a sharded batch stays as it is."""
    groups, m, length = x.shape[:3]
    return jnp.moveaxis(x.reshape(groups, m, length // size, size, *x.shape[3:]), 2, 0)


def _unchunk(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def make_logits(states: jax.Array, table: jax.Array, softcap: float | None) -> jax.Array:
    """[..., d] → [..., V] float32; with a soft-cap c they are c·tanh(logits/c) (Gemma 2)."""
    logits = jnp.einsum("...d,vd->...v", states, table, preferred_element_type=jnp.float32)
    return soft_capped(logits, softcap)


def soft_capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _chunk_logps(states: jax.Array, table: jax.Array, targets: jax.Array, chunking: Chunking) -> jax.Array:
    logits = chunking.logits(states, table)
    return _pick(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _frozen_table_logps(
    states: jax.Array, table: jax.Array, targets: jax.Array, size: int, chunking: Chunking
) -> jax.Array:
    chunks = (_chunks(states, size), _chunks(targets, size))
    return _unchunk(jax.lax.map(lambda c: _chunk_logps(c[0], table, c[1], chunking), chunks))


def _frozen_table_fwd(states, table, targets, size, chunking):  # type: ignore[no-untyped-def]
    softcap = chunking.softcap

    # The cotangent of a log-prob is one number per token, so d log p/d state = E[target] − Σ_v p_v E[v] can be computed
    # now, while the logits exist, and scaled later: the backward pass need not compute them again.
    def chunk(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t = args
        logits = chunking.logits(h, table)
        lse = jax.nn.logsumexp(logits, axis=-1)
        probs, target_rows = jnp.exp(logits - lse[..., None]), jnp.take(table, t, axis=0)
        if softcap is not None:  # the slope of the cap at its logit weights each row of the table
            slope = 1 - (logits / softcap) ** 2
            probs, target_rows = probs * slope, target_rows * _pick(slope, t)[..., None]
        mean = jnp.einsum("gmcv,vd->gmcd", probs.astype(table.dtype), table, preferred_element_type=jnp.float32)
        slopes = chunking.place((target_rows - mean).astype(h.dtype), P(layout.BATCH_AXES))
        return _pick(logits, t) - lse, slopes

    logps, slopes = jax.lax.map(chunk, (_chunks(states, size), _chunks(targets, size)))
    return _unchunk(logps), _unchunk(slopes)


def _frozen_table_bwd(size, chunking, slopes, d_logps):  # type: ignore[no-untyped-def]
    return (d_logps[..., None] * slopes).astype(slopes.dtype), None, None


_frozen_table_logps.defvjp(_frozen_table_fwd, _frozen_table_bwd)


def token_logprobs(
    states: jax.Array, table: jax.Array, targets: jax.Array, chunking: Chunking, train_table: bool
) -> jax.Array:
    """log softmax(table · state)[target] of every token.

    Args:
      states: [G, m, R, d], the hidden state that predicts each target; table: [V, d]; targets: [G, m, R] int32.
      train_table: whether the table gets a gradient (then logits are recomputed backwards).

    Returns:
      [G, m, R] float32.
    """
    size = chunking.positions(*targets.shape)
    # Gathered along `fsdp` here, not by each chunk, and cut along `tensor` still.
    table = chunking.place(table, P("tensor", None))
    if not train_table:
        return _frozen_table_logps(states, table, targets, size, chunking)
    chunk = jax.checkpoint(lambda c: _chunk_logps(c[0], table, c[1], chunking))
    return _unchunk(jax.lax.map(chunk, (_chunks(states, size), _chunks(targets, size))))
