"""The decoder: groups in, log-probabilities of their response tokens out; or token by token, for sampling.

Used functionally: `decoder.apply({"params": params, "lora": lora}, groups)`; without `lora` it is the base model.
The layers' weights are stacked and scanned over; for sampling, `unstack` takes them apart.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.data.groups import Groups
from activedpo_jax.data.packing import Packing
from activedpo_jax.models import attention, few_tokens, kernels
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.logprobs import Chunking, make_logits, soft_capped, token_logprobs
from activedpo_jax.models.lora import LoraLinear, Probe
from activedpo_jax.models.packed import Packed, pack, packed_ids, unpacked

Params = dict[str, Any]
# Tokens come in blocks: of prompts [G, P, d], of responses [G, m, R, d].  Scoring takes both, sampling one at a time.
# Packed, each block is [N, d], its texts end to end.
Blocks = list[jax.Array]
KeysValues = tuple[jax.Array, jax.Array]
Cache = list[KeysValues]  # of every layer

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the outputs of the linear maps
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the layers' inputs alone
}

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

    epsilon: float
    offset: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initial = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", initial, (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (self.offset + scale)).astype(x.dtype)


class Places(NamedTuple):
    """The positions of a batch's tokens."""

    prompt_len: jax.Array  # [G]
    start: jax.Array | int  # the position of the response block's first token in its response
    packed: Packed | None = None  # of packed blocks


class PerLayer(NamedTuple):
    """What differs between layers.  For the scan, which removes it, all fields that are not None have a leading [L]."""

    layer: Any  # the layer's index
    window: Any
    frequencies: Any  # [Dh/2]
    prompt: KeysValues | None = None  # [G, K, Dh, P], [G, K, P, Dh] of prompts that are not in the blocks
    cache: KeysValues | None = None  # [G, K·m, Dh, R], [G, K·m, R, Dh] of the responses' tokens before `start`


class Layer(nn.Module):
    """One transformer layer."""

    config: ModelConfig
    lora_scale: float
    dtype: Any
    backend: kernels.Backend

    @nn.compact
    def __call__(
        self, blocks: Blocks, per_layer: PerLayer, places: Places, probe: Probe | None
    ) -> tuple[Blocks, KeysValues | None]:
        """Returns the blocks, and what later tokens need: for prompts alone, their keys and values; for one more
        token of every response, the cache that includes it."""
        config = self.config
        one_token = per_layer.cache is not None
        # None for prompts alone: the compiler may do better than gather the weights.
        mesh = self.backend.mesh if len(blocks) > 1 or one_token else None
        pre, post = config.norms in ("pre", "both"), config.norms in ("post", "both")

        def linear(name: str, features: int, blocks: Sequence[jax.Array], bias: bool = False) -> list[jax.Array]:
            module = LoraLinear(features, self.lora_scale, self.dtype, bias, mesh, one_token, name=name)
            return module(blocks, per_layer.layer, probe)

        def whole(blocks: Sequence[jax.Array]) -> list[jax.Array]:
            # Or the compiler cuts hidden states along `tensor`, and gathers them for each map.
            return [layout.like_batch(mesh, x) for x in blocks]

        def norm(name: str, blocks: Sequence[jax.Array]) -> list[jax.Array]:
            module = RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)
            return [module(x) for x in blocks]

        def heads(blocks: Sequence[jax.Array], norm_name: str = "") -> list[jax.Array]:
            if norm_name and config.qk_norm == "width":
                blocks = norm(norm_name, blocks)
            blocks = [x.reshape(*x.shape[:-1], -1, config.head_dim) for x in blocks]
            return norm(norm_name, blocks) if norm_name and config.qk_norm == "head" else blocks

        blocks = whole(blocks)
        inputs = whole(norm("attention_norm", blocks)) if pre else blocks
        kv_width = config.num_kv_heads * config.head_dim
        q = heads(linear("q_proj", config.num_heads * config.head_dim, inputs, config.qkv_bias), "q_norm")
        k = heads(linear("k_proj", kv_width, inputs, config.qkv_bias), "k_norm")
        v = heads(linear("v_proj", kv_width, inputs, config.qkv_bias))

        rule = attention.make_rule(config, per_layer.window)
        if places.packed is None:
            attended, kept = self._padded_attention((q, k, v), per_layer, places, rule)
        else:
            attended, kept = self._packed_attention((q, k, v), per_layer, places.packed, rule), None
        out = whole(linear("o_proj", config.hidden_size, attended))
        out = norm("attention_post_norm", out) if post else out
        blocks = [x + y for x, y in zip(blocks, out, strict=True)]

        inputs = whole(norm("mlp_norm", blocks)) if pre else blocks
        gate = linear("gate_proj", config.intermediate_size, inputs)
        up = linear("up_proj", config.intermediate_size, inputs)
        act = ACTIVATIONS[config.activation]
        out = whole(linear("down_proj", config.hidden_size, [act(g) * u for g, u in zip(gate, up, strict=True)]))
        out = norm("mlp_post_norm", out) if post else out
        blocks = [x + y for x, y in zip(blocks, out, strict=True)]
        return blocks, kept

    def _packed_attention(
        self, qkv: tuple[Blocks, Blocks, Blocks], per_layer: PerLayer, where: Packed, rule: attention.Rule
    ) -> Blocks:
        q, k = (
            [attention.rotate(*x, per_layer.frequencies) for x in zip(blocks, where.positions, strict=True)]
            for blocks in qkv[:2]
        )
        return where.attention((q, k, qkv[2]), rule, self.backend)

    def _padded_attention(
        self, qkv: tuple[Blocks, Blocks, Blocks], per_layer: PerLayer, places: Places, rule: attention.Rule
    ) -> tuple[Blocks, KeysValues | None]:
        """Also returns what later tokens need."""
        q, k, v = qkv
        kept, attended = None, []
        for i, x in enumerate(q):
            # A prompt's positions start at 0 whatever its padding; each response continues where its prompt ends.
            if x.ndim == 4:
                width = x.shape[1]
                positions = jnp.maximum(jnp.arange(width) - (width - places.prompt_len[:, None]), 0)
            else:
                positions = places.prompt_len[:, None, None] + places.start + jnp.arange(x.shape[2])
            q_i, k_i = (attention.rotate(y[i], positions, per_layer.frequencies) for y in (q, k))
            if x.ndim == 4:
                prompt_kv = (k_i, v[i])
                attended.append(kernels.prompt_attention(q_i, *prompt_kv, places.prompt_len, rule, self.backend))
                if len(q) == 1:
                    kept = attention.kept(k_i, v[i])
            elif per_layer.cache is None:
                attended.append(
                    kernels.response_attention(q_i, k_i, v[i], *prompt_kv, places.prompt_len, rule, self.backend)
                )
            else:
                assert per_layer.prompt is not None
                kept = attention.extended(per_layer.cache, k_i, v[i], places.start)
                attended.append(
                    attention.cached_attention(q_i, per_layer.prompt, kept, places.prompt_len, rule, places.start)
                )
        return attended, kept


class Embedding(nn.Module):
    """A [V, d] table: of the input tokens, and of the output tokens where the two are tied."""

    vocab_size: int
    hidden_size: int

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (self.vocab_size, self.hidden_size))

    def __call__(self) -> jax.Array:
        return self.embedding


class Decoder(nn.Module):
    """A causal language model that scores groups, and gives the logits that continue them.

    `dtype` is the compute dtype; float32 master copies, reductions and results do not depend on it.  An `unrolled`
    decoder takes the weights that `unstack` returns: a scan would copy each layer's from the stack for every token.
    """

    config: ModelConfig
    lora: LoraConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    logits_chunk: int = 512
    attention: str = "auto"  # the kernel, one of `kernels.CHOICES`
    mesh: Mesh | None = None  # the programs' mesh; None: the default device
    unrolled: bool = False
    packing: Packing | None = None  # of the groups that are scored, which it has to hold; None: they are padded

    def setup(self) -> None:
        config = self.config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        arguments = (config, self.lora.scale, self.dtype, kernels.Backend(self.attention, self.mesh))
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        if self.unrolled:
            self.layers: Any = [layer(*arguments) for _ in range(config.num_layers)]
        else:
            self.layers = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=config.num_layers,
            )(*arguments)
        self.final_norm = RMSNorm(config.rms_norm_eps, config.norm_offset)
        if not config.tie_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size)

    def __call__(self, groups: Groups, probe: Probe | None = None, train_base: bool = False) -> jax.Array:
        """log π(token | the tokens before it) of every response token.

        Args:
          groups: G prompts with m responses each.
          probe: makes the backward pass return gradient sketches; see `models.lora`.
          train_base: gives the output table a gradient too, at the price of computing the logits twice.

        Returns:
          [G, m, R] float32, 0 at padding.
        """
        chunking = Chunking(self.logits_chunk, self.config.logit_softcap, self.mesh)
        if self.packing is not None:
            where, ids, (prompt, response) = self._encoded_packed(groups, probe)
            states = self.final_norm(where.before(prompt, response))[None, None]
            logps = token_logprobs(states, self._output_table(), ids[None, None], chunking, train_base)
            return unpacked(logps[0, 0], groups, where)
        # The states before the response tokens: the prompt's last, then all of the response's but its last.
        first, response = self._encoded(groups, probe)
        states = self.final_norm(jnp.concatenate([first, response[:, :, :-1]], axis=2))
        targets = jnp.asarray(groups.response_ids)
        logps = token_logprobs(states, self._output_table(), targets, chunking, train_base)
        present = jnp.arange(logps.shape[2]) < jnp.asarray(groups.response_len)[..., None]
        return jnp.where(present, logps, 0.0)

    def states(self, groups: Groups) -> jax.Array:
        """The last hidden state of every response, after the final norm.

        Returns:
          [G, m, d] float32: of the response's last token; of the prompt's where the response has none.
        """
        if self.packing is not None:
            where, _, blocks = self._encoded_packed(groups, None)
            return self.final_norm(where.last(*blocks)).astype(jnp.float32)
        prompt, response = self._encoded(groups, None)
        length = jnp.asarray(groups.response_len)[..., None, None]
        last = jnp.take_along_axis(response, jnp.maximum(length - 1, 0), axis=2)
        return self.final_norm(jnp.where(length > 0, last, prompt)[:, :, 0]).astype(jnp.float32)

    def prefill(self, prompt_ids: jax.Array, prompt_len: jax.Array) -> tuple[jax.Array, Cache]:
        """Encodes prompts, left-padded as in `Groups`; needs an unrolled decoder.

        Returns:
          The logits [G, V] float32 of each response's first token, and the prompts' keys [G, K, Dh, P] and values
          [G, K, P, Dh].
        """
        (prompt,), kept = self._through_layers([self._embedded(prompt_ids)], Places(prompt_len, 0), None)
        return self._logits(prompt[:, -1]), kept

    def decode(
        self, tokens: jax.Array, place: jax.Array, prompt_len: jax.Array, prompt: Cache, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """One more token of every response; needs an unrolled decoder.

        Args:
          tokens: [G, m] int32, the tokens at `place` (scalar int32) of the responses.
          prompt: what `prefill` returned.
          cache: keys [G, K·m, Dh, R] and values [G, K·m, R, Dh] of the responses' tokens before `place`; what
            follows may be anything finite.

        Returns:
          The logits [G, m, V] float32 of the next token, and the cache that includes these.
        """
        blocks = [self._embedded(tokens[:, :, None])]
        (response,), new = self._through_layers(blocks, Places(prompt_len, place), None, prompt, cache)
        return self._logits(response[:, :, 0]), new

    def _encoded(self, groups: Groups, probe: Probe | None) -> tuple[jax.Array, jax.Array]:
        """The last layer's output for the prompt's last token, [G, m, 1, d], and the responses, [G, m, R, d]."""
        blocks = [self._embedded(groups.prompt_ids), self._embedded(groups.response_ids)]
        (prompt, response), _ = self._through_layers(blocks, Places(jnp.asarray(groups.prompt_len), 0), probe)
        return jnp.broadcast_to(prompt[:, None, -1:], (*response.shape[:2], 1, response.shape[3])), response

    def _encoded_packed(self, groups: Groups, probe: Probe | None) -> tuple[Packed, jax.Array, Blocks]:
        """Where the tokens are, those of the responses, and the last layer's output, [N, d] and [N', d]."""
        assert self.packing is not None
        where = pack(groups, self.packing)
        ids = packed_ids(groups, where)
        if probe is not None:
            probe = probe._replace(packed=where)
        places = Places(where.prompts.length, 0, where)
        blocks, _ = self._through_layers([self._embedded(x) for x in ids], places, probe)
        return where, ids[1], blocks

    def _embedded(self, ids: Any) -> jax.Array:
        x = jnp.take(self.embed(), ids, axis=0).astype(self.dtype)
        if not self.unrolled:
            x = layout.like_table(self.mesh, x)
        return x * jnp.asarray(self.config.hidden_size**0.5, self.dtype) if self.config.scale_embeddings else x

    def _output_table(self) -> jax.Array:
        return (self.embed if self.config.tie_embeddings else self.lm_head)().astype(self.dtype)

    def _logits(self, states: jax.Array) -> jax.Array:
        states, table, softcap = self.final_norm(states), self._output_table(), self.config.logit_softcap
        states = layout.at_weights(self.mesh, "lm_head", table.shape, states)
        if kernels.Backend(self.attention, self.mesh).platform == "cpu":
            logits = soft_capped(few_tokens.product(states, table), softcap)
        else:
            logits = make_logits(states, table, softcap)
        return layout.from_weights(self.mesh, "lm_head", table.shape, logits)

    def _through_layers(
        self,
        blocks: Blocks,
        places: Places,
        probe: Probe | None,
        prompt: Cache | None = None,
        cache: Cache | None = None,
    ) -> tuple[Blocks, Any]:
        count = self.config.num_layers
        windows, frequencies = attention.windows(self.config), attention.rope_frequencies(self.config)
        if not self.unrolled:
            per_layer = PerLayer(jnp.arange(count), jnp.asarray(windows), jnp.asarray(frequencies))
            return self.layers(blocks, per_layer, places, probe)
        kept = []
        nothing = [None] * count
        for i, (layer, *caches) in enumerate(zip(self.layers, prompt or nothing, cache or nothing, strict=True)):
            blocks, new = layer(blocks, PerLayer(i, windows[i], frequencies[i], *caches), places, probe)
            kept.append(new)
        return blocks, kept


def unstack(tree: Any, outputs_first: bool = False) -> Any:
    """The weights (or the adapter) of an unrolled decoder from those of a scanned one: a copy of the layers.

    Args:
      outputs_first: kernels become `few_tokens.OutputsFirst`, which are faster on CPUs.
    """
    count = len(jax.tree.leaves(tree["layers"])[0])

    def slice_of(path: tuple[Any, ...], leaf: jax.Array, i: int) -> Any:
        turned = outputs_first and path[-1] == jax.tree_util.DictKey("kernel")
        return few_tokens.OutputsFirst(leaf[i].T) if turned else leaf[i]

    layers = {
        f"layers_{i}": jax.tree.map_with_path(functools.partial(slice_of, i=i), tree["layers"]) for i in range(count)
    }
    return {name: value for name, value in tree.items() if name != "layers"} | layers


def init_params(decoder: Decoder, key: jax.Array) -> Params:
    """Random weights (normal, 0.02), for decoders that are trained from scratch."""
    example = Groups(np.zeros((1, 1), int), np.ones((1,), int), np.zeros((1, 1, 1), int), np.ones((1, 1), int))
    # The kernel asked for may be unable to run a single token, and the packing is one of other groups.
    decoder = decoder.clone(attention="xla", packing=None)
    return jax.jit(decoder.init)(key, example)["params"]
