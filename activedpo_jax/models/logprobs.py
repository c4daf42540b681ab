"""Log-probabilities of tokens from hidden states, without ever holding the logits of a whole batch.

A 256k vocabulary costs as much as many layers, and its logits take more memory than all of them; so they are computed
for a few tokens at a time.
"""

import functools

import jax
import jax.numpy as jnp


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


def _chunk_logps(states: jax.Array, table: jax.Array, targets: jax.Array, softcap: float | None) -> jax.Array:
    logits = make_logits(states, table, softcap)
    return _pick(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _frozen_table_logps(
    states: jax.Array, table: jax.Array, targets: jax.Array, size: int, softcap: float | None
) -> jax.Array:
    chunks = (_chunks(states, size), _chunks(targets, size))
    return _unchunk(jax.lax.map(lambda c: _chunk_logps(c[0], table, c[1], softcap), chunks))


def _frozen_table_fwd(states, table, targets, size, softcap):  # type: ignore[no-untyped-def]
    # The cotangent of a log-prob is one number per token, so d log p/d state = E[target] − Σ_v p_v E[v] can be computed
    # now, while the logits exist, and scaled later: the backward pass need not compute them again.
    def chunk(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, t = args
        logits = make_logits(h, table, softcap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        probs, target_rows = jnp.exp(logits - lse[..., None]), jnp.take(table, t, axis=0)
        if softcap is not None:  # the slope of the cap at its logit weights each row of the table
            slope = 1 - (logits / softcap) ** 2
            probs, target_rows = probs * slope, target_rows * _pick(slope, t)[..., None]
        mean = jnp.einsum("gmcv,vd->gmcd", probs.astype(table.dtype), table, preferred_element_type=jnp.float32)
        return _pick(logits, t) - lse, (target_rows - mean).astype(h.dtype)

    logps, slopes = jax.lax.map(chunk, (_chunks(states, size), _chunks(targets, size)))
    return _unchunk(logps), _unchunk(slopes)


def _frozen_table_bwd(size, softcap, slopes, d_logps):  # type: ignore[no-untyped-def]
    return (d_logps[..., None] * slopes).astype(slopes.dtype), None, None


_frozen_table_logps.defvjp(_frozen_table_fwd, _frozen_table_bwd)


def token_logprobs(
    states: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    tokens_per_chunk: int,
    train_table: bool,
    softcap: float | None = None,
) -> jax.Array:
    """log softmax(table · state)[target] of every token.

    Args:
      states: [G, m, R, d], the hidden state that predicts each target; table: [V, d]; targets: [G, m, R] int32.
      tokens_per_chunk: about how many tokens' logits exist at a time (at least one position of each response).
      train_table: whether the table gets a gradient (then logits are recomputed backwards).

    Returns:
      [G, m, R] float32.
    """
    groups, m, length = targets.shape
    wanted = max(1, tokens_per_chunk // (groups * m))
    size = max(s for s in range(1, min(length, wanted) + 1) if length % s == 0)
    if not train_table:
        return _frozen_table_logps(states, table, targets, size, softcap)
    chunk = jax.checkpoint(lambda c: _chunk_logps(c[0], table, c[1], softcap))
    return _unchunk(jax.lax.map(chunk, (_chunks(states, size), _chunks(targets, size))))
