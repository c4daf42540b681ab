"""The decoder: groups in, log-probabilities of their response tokens out.

Used functionally: `decoder.apply({"params": params, "lora": lora}, groups)`; without `lora` it is the reference model.
The layers' weights are stacked and scanned over.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Groups
from activedpo_jax.models.attention import prompt_attention, response_attention, rope_frequencies, rotate
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.logprobs import token_logprobs
from activedpo_jax.models.lora import LoraLinear, Probe

Params = dict[str, Any]
Hidden = tuple[jax.Array, jax.Array]  # prompt [G, P, d], responses [G, m, R, d]

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the outputs of the linear maps
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the layers' inputs alone
}


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class Layer(nn.Module):
    """One pre-norm transformer layer of the Llama family, on the two token blocks of a group."""

    config: ModelConfig
    lora_scale: float
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: Hidden, layer: jax.Array, prompt_len: jax.Array, probe: Probe | None
    ) -> tuple[Hidden, None]:
        config = self.config

        def linear(name: str, features: int, blocks: Any) -> list[jax.Array]:
            return LoraLinear(features, self.lora_scale, self.dtype, name=name)(blocks, layer, probe)

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], -1, config.head_dim)

        prompt, response = hidden
        norm = RMSNorm(config.rms_norm_eps, name="input_norm")
        normed = (norm(prompt), norm(response))
        kv_width = config.num_kv_heads * config.head_dim
        q = [heads(x) for x in linear("q_proj", config.num_heads * config.head_dim, normed)]
        k = [heads(x) for x in linear("k_proj", kv_width, normed)]
        v = [heads(x) for x in linear("v_proj", kv_width, normed)]

        # A prompt's positions start at 0 whatever its padding; each response goes on where its prompt ends.
        width = prompt.shape[1]
        prompt_positions = jnp.maximum(jnp.arange(width) - (width - prompt_len[:, None]), 0)
        response_positions = prompt_len[:, None, None] + jnp.arange(response.shape[2])
        frequencies = rope_frequencies(config)
        q = [rotate(q[0], prompt_positions, frequencies), rotate(q[1], response_positions, frequencies)]
        k = [rotate(k[0], prompt_positions, frequencies), rotate(k[1], response_positions, frequencies)]
        attended = (
            prompt_attention(q[0], k[0], v[0], prompt_len),
            response_attention(q[1], k[1], v[1], k[0], v[0], prompt_len),
        )
        out = linear("o_proj", config.hidden_size, attended)
        prompt, response = prompt + out[0], response + out[1]

        norm = RMSNorm(config.rms_norm_eps, name="post_attention_norm")
        normed = (norm(prompt), norm(response))
        gate = linear("gate_proj", config.intermediate_size, normed)
        up = linear("up_proj", config.intermediate_size, normed)
        out = linear("down_proj", config.hidden_size, [jax.nn.silu(g) * u for g, u in zip(gate, up, strict=True)])
        return (prompt + out[0], response + out[1]), None


class Embedding(nn.Module):
    """A [V, d] table: of the input tokens, and of the output tokens where the two are tied."""

    vocab_size: int
    hidden_size: int

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (self.vocab_size, self.hidden_size))

    def __call__(self) -> jax.Array:
        return self.embedding


class Decoder(nn.Module):
    """A causal language model that scores groups.

    `dtype` is the compute dtype; float32 master copies, reductions and results do not depend on it.
    """

    config: ModelConfig
    lora: LoraConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    logits_chunk: int = 512

    @nn.compact
    def __call__(self, groups: Groups, probe: Probe | None = None, train_base: bool = False) -> jax.Array:
        """Log π(token | what stands before it) of every response token.

        Args:
          groups: G prompts with m responses each.
          probe: makes the backward pass return gradient sketches; see `models.lora`.
          train_base: the output table gets a gradient too, at the price of computing the logits twice.

        Returns:
          [G, m, R] float32, 0 at padding.
        """
        config = self.config
        table = Embedding(config.vocab_size, config.hidden_size, name="embed")()
        prompt = jnp.take(table, groups.prompt_ids, axis=0).astype(self.dtype)
        response = jnp.take(table, groups.response_ids, axis=0).astype(self.dtype)

        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )(config, self.lora.scale, self.dtype, name="layers")
        (prompt, response), _ = layers(
            (prompt, response), jnp.arange(config.num_layers), jnp.asarray(groups.prompt_len), probe
        )

        # The state before each response token: the prompt's last, then the response's own but its last.
        first = jnp.broadcast_to(prompt[:, None, -1:], (*response.shape[:2], 1, response.shape[3]))
        states = jnp.concatenate([first, response[:, :, :-1]], axis=2)
        states = RMSNorm(config.rms_norm_eps, name="final_norm")(states)
        if not config.tie_embeddings:
            table = Embedding(config.vocab_size, config.hidden_size, name="lm_head")()
        logps = token_logprobs(
            states, table.astype(self.dtype), jnp.asarray(groups.response_ids), self.logits_chunk, train_base
        )
        present = jnp.arange(logps.shape[2]) < jnp.asarray(groups.response_len)[..., None]
        return jnp.where(present, logps, 0.0)


def init_params(decoder: Decoder, key: jax.Array) -> Params:
    """Random weights (normal, 0.02), for decoders that are trained from scratch."""
    one = Groups(np.zeros((1, 1), int), np.ones((1,), int), np.zeros((1, 1, 1), int), np.ones((1, 1), int))
    return jax.jit(decoder.init)(key, one)["params"]
