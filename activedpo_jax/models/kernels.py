"""Attention by platform: cuDNN's flash attention on NVIDIA, Pallas' splash attention on TPU, plain XLA elsewhere.

`prompt_attention` and `response_attention` compute the same as those of `models.attention`, which are the XLA path.
The kernel of a call is chosen while tracing, from what is known then: the program's platform, shapes, dtype, the
model's features.

A fused kernel never keeps scores in memory.  Both calls are the same to it: causal attention of the last Q of S
positions, the first of which may be padding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from activedpo_jax import layout
from activedpo_jax.models import attention
from activedpo_jax.models.attention import Rule

CHOICES = ("auto", "xla", "cudnn", "splash")

_FOR_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}
_LANES = 128  # splash's blocks are multiples of it
_BLOCK = 512  # tokens, the largest block of splash
_WASTE = 4  # cuDNN may compute this many times the scores needed: an estimate, not timed yet
_INTERPRET = False  # for tests on CPU: splash in Pallas' interpreter
_CUDNN: Any = "cudnn"  # for tests on CPU: "xla" computes what cuDNN would

Rows = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v, number of padded keys → output


@dataclasses.dataclass(frozen=True)
class Backend:
    """The kernel asked for, and where it will run."""

    kernel: str = "auto"  # one of CHOICES
    mesh: Mesh | None = None  # of the program; None: the default device

    @property
    def platform(self) -> str:
        return (jax.devices() if self.mesh is None else self.mesh.devices.flat)[0].platform


class Call(NamedTuple):
    """The static facts of a call."""

    queries: int  # Q
    keys: int  # S
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    softcap: float | None
    limits: tuple[int | None, ...]


def prompt_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_len: jax.Array, rule: Rule, backend: Backend
) -> jax.Array:
    """As `attention.prompt_attention`, by the kernel that the call takes.

    Raises:
      ValueError: the backend's kernel cannot run this; says why, and what to set.
    """
    call = _call(q, k.shape[1], k.shape[2], rule)
    if (kernel := choose(backend, call)) == "xla":
        return attention.prompt_attention(q, k, v, prompt_len, rule)
    out = _rows(kernel, q, k, v, k.shape[1] - prompt_len, rule, call, backend.mesh)
    return out.reshape(*out.shape[:-2], -1)


def response_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_len: jax.Array,
    rule: Rule,
    backend: Backend,
) -> jax.Array:
    """As `attention.response_attention`, by the kernel that the call takes.

    Raises:
      ValueError: the backend's kernel cannot run this; says why, and what to set.
    """
    groups, m, length = q.shape[:3]
    prompt = prompt_k.shape[1]
    call = _call(q, prompt + length, k.shape[3], rule)
    if (kernel := choose(backend, call)) == "xla":
        return attention.response_attention(q, k, v, prompt_k, prompt_v, prompt_len, rule)

    def row(shared: jax.Array, response: jax.Array) -> jax.Array:
        shared = jnp.broadcast_to(shared[:, None], (groups, m, *shared.shape[1:]))
        return _merge(jnp.concatenate([shared, response], axis=2))

    padding = jnp.repeat(prompt - prompt_len, m)
    out = _rows(kernel, _merge(q), row(prompt_k, k), row(prompt_v, v), padding, rule, call, backend.mesh)
    return out.reshape(groups, m, length, -1)


def _merge(x: jax.Array) -> jax.Array:
    """[G, m, ...] → [G·m, ...]"""
    return x.reshape(-1, *x.shape[2:])


def _call(q: jax.Array, keys: int, kv_heads: int, rule: Rule) -> Call:
    heads, head_dim = q.shape[-2:]
    # A window that covers all keys is no limit.
    limits = tuple(dict.fromkeys(None if n is None or n >= keys else n for n in rule.limits))
    return Call(q.shape[-3], keys, heads, kv_heads, head_dim, q.dtype, rule.softcap, limits)


def choose(backend: Backend, call: Call) -> str:
    """The kernel of a call: `xla`, `cudnn` or `splash`.

    Raises:
      ValueError: a kernel that was asked for by name is unknown, or cannot run this call.
    """
    asked = backend.kernel
    if asked not in CHOICES:
        raise ValueError(f"config.model.attention={asked!r}: expected one of {', '.join(CHOICES)}")
    if asked == "auto":
        kernel = _FOR_PLATFORM.get(backend.platform, "xla")
        return kernel if kernel != "xla" and objection(kernel, backend, call) is None and _pays(kernel, call) else "xla"
    if asked != "xla" and (reason := objection(asked, backend, call)) is not None:
        raise ValueError(f"config.model.attention={asked!r}: {reason}, or set 'auto', which takes XLA where it must")
    return asked


def objection(kernel: str, backend: Backend, call: Call) -> str | None:
    """Why `cudnn` or `splash` cannot run a call, and what would change that; None if it can."""
    platform = backend.platform
    if _FOR_PLATFORM.get(platform) != kernel:
        home = {"splash": "a TPU", "cudnn": "an NVIDIA GPU"}[kernel]
        return f"it needs {home}, but the program is for platform {platform!r}: set 'xla'"
    return (_splash_objection if kernel == "splash" else _cudnn_objection)(backend.mesh, call)


def _pays(kernel: str, call: Call) -> bool:
    """Whether a fused kernel that can run a call is the better choice."""
    # Splash always: compiled for a v5e, a layer's forward and backward pass moves a third of XLA's bytes at P = R = 512
    # and two thirds at 128.
    needed = call.queries * call.keys
    return kernel == "splash" or call.keys**2 / 2 <= _WASTE * needed


# On the mesh: the compiler cannot cut a kernel, so every device is given its own rows and heads.


def _rows(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    rule: Rule,
    call: Call,
    mesh: Mesh | None,
) -> jax.Array:
    """Causal attention of the last Q of S positions, of which the first `padding` are never seen.

    Args:
      q: [B, Q, H, Dh]; k, v: [B, S, K, Dh]; padding: [B] int32.

    Returns:
      [B, Q, H, Dh] in q's dtype; anything finite where a query is padding.
    """

    def within(limit: int | None) -> jax.Array:
        if kernel == "splash":
            rows: Rows = functools.partial(_splash_rows, rule.scale, rule.softcap, limit)
        else:
            rows = functools.partial(_cudnn_rows, _Flash(rule.scale, limit))
        return _on_mesh(rows, q, k, v, padding, mesh)

    if len(call.limits) == 1:
        return within(call.limits[0])
    # A window is compiled into its kernel, so there is one kernel for each of the two.
    local = next(n for n in call.limits if n is not None)
    return jax.lax.cond(rule.window <= local, lambda: within(local), lambda: within(None))


def _on_mesh(rows: Rows, q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array, mesh: Mesh | None) -> jax.Array:
    if mesh is None or mesh.size == 1:
        return rows(q, k, v, padding)
    heads, kv_heads, tensor = q.shape[2], k.shape[2], mesh.shape["tensor"]
    # Each device needs whole groups of query heads, so a key head that several devices share is repeated for them.
    needed = math.lcm(kv_heads, tensor)
    cut = "tensor" if heads % needed == 0 else None
    if cut and needed > kv_heads:
        k, v = (jnp.repeat(x, needed // kv_heads, axis=2) for x in (k, v))
    batch = layout.BATCH_AXES if q.shape[0] % layout.axis_size(mesh, layout.BATCH_AXES) == 0 else None
    spec = P(batch, None, cut, None)
    local = jax.shard_map(rows, mesh=mesh, in_specs=(spec, spec, spec, P(batch)), out_specs=spec, check_vma=False)
    return local(q, k, v, padding)


# Splash attention


def _splash_objection(mesh: Mesh | None, call: Call) -> str | None:
    if call.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 or float32, not {call.dtype}: set config.model.dtype"
    prompt, response = call.keys - call.queries, call.queries
    lengths = {"prompt": prompt or response, "response": response}
    for name, length in lengths.items():
        if length % _LANES:
            return (
                f"its blocks are multiples of {_LANES} tokens, but a bucket has {name}s of {length}: choose "
                f"config.data.buckets of such multiples"
            )
    if mesh is None and jax.device_count() > 1:
        return "on several devices it needs the decoder's `mesh`: give one"
    return None


def _block(length: int) -> int:
    """The largest block that divides a length: a multiple of _LANES, at most _BLOCK."""
    return max(n for n in range(_LANES, min(length, _BLOCK) + 1, _LANES) if length % n == 0)


def _splash_rows(
    scale: float,
    softcap: float | None,
    limit: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention  # experimental, so imported only where used

    (queries, heads), keys = q.shape[1:3], k.shape[1]
    shape, offset = (queries, keys), keys - queries
    mask = (
        splash_attention.CausalMask(shape, offset)
        if limit is None
        else splash_attention.LocalMask(shape, (limit - 1, 0), offset)
    )
    rows, columns = _block(queries), _block(keys)
    sizes = splash_attention.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=_INTERPRET,
    )
    # Padding is a text of its own: it sees itself, so that no row is empty, and nothing else sees it.
    text = (jnp.arange(keys) >= padding[:, None]).astype(jnp.int32)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(text[:, offset:], text))
    return jnp.swapaxes(out, 1, 2)


# cuDNN's flash attention.  Given a mask, it reads a bias [B, 1, Q, S] and writes its gradient, so it is given none:
# each row is rotated until its padding is at the end, where causal attention does not look.  Since its causal mask
# needs as many queries as keys, the Q queries follow S − Q others, whose outputs are dropped.


class _Flash(NamedTuple):
    """Causal attention [B, S, H, Dh] without padding."""

    scale: float
    limit: int | None

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        window = None if self.limit is None else (self.limit - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, scale=self.scale, is_causal=True, local_window_size=window, implementation=_CUDNN
        )


def _cudnn_objection(mesh: Mesh | None, call: Call) -> str | None:
    if call.softcap is not None:
        return "it has no soft-cap, which this model's attention has: set 'xla'"
    for limit in call.limits:
        reason = _refusal(call.keys, call.heads, call.kv_heads, call.head_dim, jnp.dtype(call.dtype), limit)
        if reason is not None:
            return f"{reason.rstrip('.')}: set 'xla'"
    return None


@functools.lru_cache
def _refusal(length: int, heads: int, kv_heads: int, head_dim: int, dtype: Any, limit: int | None) -> str | None:
    """What JAX says when it refuses such a call, forwards or backwards."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(_Flash(1.0, limit)(q, k, v).astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((1, length, h, head_dim), dtype) for h in (heads, kv_heads))
    try:
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), q, k, k)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def _folded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays [B, ...], with an axis that `vmap` adds made part of B.

    JAX's own rule for this kernel needs all arguments mapped or none, but a prompt's keys are not mapped where the
    gradients that arrive at them are.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def _(size: int, mapped: Any, *arrays: jax.Array) -> tuple[Any, Any]:
        def fold(x: jax.Array, is_mapped: bool) -> jax.Array:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return _merge(jnp.swapaxes(x, 0, 1))

        def unfold(x: jax.Array) -> jax.Array:
            return jnp.swapaxes(x.reshape(-1, size, *x.shape[1:]), 0, 1)

        out = jax.tree.map(unfold, _folded(function)(*map(fold, arrays, mapped)))
        return out, jax.tree.map(lambda _: True, out)

    return folded


def _rotate(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Each row of [B, S, ...] rotated to the left by its number of places."""
    places = (jnp.arange(x.shape[1]) + shift[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


def _among(x: jax.Array, length: int) -> jax.Array:
    """[B, Q, ...] → [B, S, ...], zeros first."""
    return jnp.pad(x, ((0, 0), (length - x.shape[1], 0), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn_rows(flash: _Flash, q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array) -> jax.Array:
    def forward(q: jax.Array, k: jax.Array, v: jax.Array, padding: jax.Array) -> jax.Array:
        rotated = [_rotate(x, padding) for x in (_among(q, k.shape[1]), k, v)]
        return _rotate(flash(*rotated), -padding)[:, -q.shape[1] :]

    return _folded(forward)(q, k, v, padding)


def _cudnn_rows_fwd(flash, q, k, v, padding):  # type: ignore[no-untyped-def]
    return _cudnn_rows(flash, q, k, v, padding), (q, k, v, padding)


def _cudnn_rows_bwd(flash, residuals, d_out):  # type: ignore[no-untyped-def]
    # The forward pass is computed again, since JAX does not give out what its backward pass needs; next to the linear
    # maps it is cheap.
    def backward(q, k, v, padding, d_out):  # type: ignore[no-untyped-def]
        length = k.shape[1]
        rotated = [_rotate(x, padding) for x in (_among(q, length), k, v)]
        _, pull = jax.vjp(flash, *rotated)
        dq, dk, dv = (_rotate(x, -padding) for x in pull(_rotate(_among(d_out, length), padding)))
        return dq[:, -q.shape[1] :], dk, dv

    return *_folded(backward)(*residuals, d_out), None


_cudnn_rows.defvjp(_cudnn_rows_fwd, _cudnn_rows_bwd)
