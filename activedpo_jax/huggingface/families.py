"""Model families: how a Hugging Face config and checkpoint are read, as one short description each.

There is one decoder; a family says which of its parts it has.  A config is read, and what it leaves out is filled in,
as transformers' class of that family does.  A feature that the decoder lacks is refused by name: a model never runs
silently wrong.  (`attention_dropout` is not such a feature.  It acts in training only, and preference training goes
without dropout, as in TRL, so that the policy and its reference differ by their weights only.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from activedpo_jax.huggingface.fields import (
    Fields,
    activation,
    local_layers,
    one_rope,
    refuse_unsupported,
    two_ropes,
    unrotated_layers,
)
from activedpo_jax.models.config import ModelConfig

_LAYER = "model.layers.{layer}"
# The name of each linear map of a layer in a checkpoint; the same in every family.
LINEAR_MAPS = {f"{name}_proj": f"{_LAYER}.self_attn.{name}_proj" for name in "qkvo"} | {
    f"{name}_proj": f"{_LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down")
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf of the parameter tree in a checkpoint.

    A name with `{layer}` stands for one tensor per layer, which the leaf stacks.  `transposed`: the checkpoint has a
    linear map as [out, in], the decoder as [in, out].
    """

    name: str
    transposed: bool = False


Weights = dict[tuple[str, ...], Weight]  # by path in the parameter tree


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` of Hugging Face maps onto the decoder."""

    architecture: str  # the class in `architectures` that has a language-model head and nothing else
    defaults: dict[str, Any]  # fields that its configs have besides the sizes, as transformers fills them in
    weights: Weights
    decoder: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig that all its models share
    varying: Callable[[Fields], Fields] = lambda config: {}  # fields of ModelConfig that vary by config


def _norms(**names: str) -> Weights:
    return {("layers", ours, "scale"): Weight(f"{_LAYER}.{theirs}.weight") for ours, theirs in names.items()}


_QK_NORMS = _norms(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_QKV_BIASES = {("layers", m, "bias"): Weight(f"{LINEAR_MAPS[m]}.bias") for m in ("q_proj", "k_proj", "v_proj")}
_OUTER: Weights = {
    ("embed", "embedding"): Weight("model.embed_tokens.weight"),
    ("final_norm", "scale"): Weight("model.norm.weight"),
    ("lm_head", "embedding"): Weight("lm_head.weight"),
} | {("layers", m, "kernel"): Weight(f"{name}.weight", transposed=True) for m, name in LINEAR_MAPS.items()}


# --- Fields of ModelConfig that vary by config


def _window_of_all(config: Fields) -> Fields:
    return {"window": config["sliding_window"]}


def _window_of_upper_layers(config: Fields) -> Fields:
    windowed = config["use_sliding_window"] and config["sliding_window"] is not None
    return local_layers(config, lambda i: windowed and i >= config["max_window_layers"])


def _gemma2(config: Fields) -> Fields:
    return {
        **local_layers(config, lambda i: i % 2 == 0),
        "query_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": config["attn_logit_softcapping"],
        "logit_softcap": config["final_logit_softcapping"],
    }


def _gemma3(config: Fields) -> Fields:
    return {
        **local_layers(config, lambda i: (i + 1) % config["sliding_window_pattern"] != 0),
        "query_scale": config["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": config["final_logit_softcapping"],
        **two_ropes(config),
    }


def _smollm3(config: Fields) -> Fields:
    unrotated = unrotated_layers(config)
    windowed = config["use_sliding_window"] and config["sliding_window"] is not None
    return {"unrotated": unrotated, **local_layers(config, lambda i: windowed and unrotated[i])}


# --- The families

LLAMA = Family(
    architecture="LlamaForCausalLM",
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False},
    weights=_OUTER | _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    defaults=LLAMA.defaults | {"num_key_value_heads": 8, "sliding_window": 4096},
    varying=_window_of_all,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    defaults=LLAMA.defaults
    | {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    | {"layer_types": None},
    weights=LLAMA.weights | _QKV_BIASES,
    decoder={"qkv_bias": True},
    varying=_window_of_upper_layers,
)

QWEN3 = dataclasses.replace(
    QWEN2,
    architecture="Qwen3ForCausalLM",
    defaults=QWEN2.defaults | {"head_dim": 128},
    weights=LLAMA.weights | _QK_NORMS,
    decoder={"qk_norm": "head"},
)

GEMMA = dataclasses.replace(
    LLAMA,
    architecture="GemmaForCausalLM",
    defaults=LLAMA.defaults
    | {"num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    decoder={"norm_offset": 1.0, "scale_embeddings": True},
)

GEMMA2 = dataclasses.replace(
    GEMMA,
    architecture="Gemma2ForCausalLM",
    defaults=GEMMA.defaults
    | {"num_key_value_heads": 4, "sliding_window": 4096, "layer_types": None, "query_pre_attn_scalar": 256}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    weights=_OUTER
    | _norms(attention_norm="input_layernorm", attention_post_norm="post_attention_layernorm")
    | _norms(mlp_norm="pre_feedforward_layernorm", mlp_post_norm="post_feedforward_layernorm"),
    decoder=GEMMA.decoder | {"norms": "both"},
    varying=_gemma2,
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    architecture="Gemma3ForCausalLM",
    # No attn_logit_softcapping: transformers' config has it, but its model ignores it.
    defaults={name: value for name, value in GEMMA2.defaults.items() if name != "attn_logit_softcapping"}
    | {"final_logit_softcapping": None, "sliding_window_pattern": 6}
    | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    weights=GEMMA2.weights | _QK_NORMS,
    decoder=GEMMA2.decoder | {"qk_norm": "head"},
    varying=_gemma3,
)

SMOLLM3 = dataclasses.replace(
    LLAMA,
    architecture="SmolLM3ForCausalLM",
    defaults=LLAMA.defaults
    | {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True}
    | {"no_rope_layers": None, "no_rope_layer_interval": 4}
    | {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    varying=_smollm3,
)

OLMO2 = dataclasses.replace(
    LLAMA,
    architecture="Olmo2ForCausalLM",
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    weights=_OUTER
    | _norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
    | _QK_NORMS,
    decoder={"norms": "post", "qk_norm": "width"},
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
}


# --- Reading a config

# ModelConfig's fields and the config's, which are required.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}

# Fields in which null is a value of its own; elsewhere it means that the field is left out.
_NULLABLE = {"num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}


def family(hf_config: Fields) -> Family:
    """The family of a `config.json`.

    Raises:
      ValueError: its `model_type` has none.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}; the families supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def model_config(hf_config: Fields) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Raises:
      ValueError: a model type or a feature that the decoder does not support, or a missing field.
    """
    model_family = family(hf_config)
    missing = [name for name in _SIZES.values() if hf_config.get(name) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; expected in the config of every {hf_config['model_type']} model")
    for name in (*_SIZES.values(), "num_key_value_heads", "head_dim"):
        size = hf_config.get(name)
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} is {size!r}; expected a whole number above 0")
    refuse_unsupported(hf_config, model_family.architecture, model_family.defaults.keys())

    given = {name: value for name, value in hf_config.items() if value is not None or name in _NULLABLE}
    config = {**model_family.defaults, **given}
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    fields: dict[str, Any] = {
        **{ours: config[theirs] for ours, theirs in _SIZES.items()},
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": config.get("head_dim", config["hidden_size"] // heads),
        "activation": activation(config),
        "tie_embeddings": config["tie_word_embeddings"],
        "rms_norm_eps": float(config["rms_norm_eps"]),
        **model_family.decoder,
        **model_family.varying(config),
    }
    return ModelConfig(**(fields if "rope" in fields else {**fields, "rope": one_rope(config)}))
