"""Model families: how a Hugging Face config and checkpoint are read, as one short description each.

A feature that the decoder does not have is refused with its name: a model never runs silently wrong.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from activedpo_jax.models.config import ModelConfig, Rope, RopeScaling

# Where each linear map of a layer stands in a checkpoint; the same in every family.
LINEAR_MAPS = {
    "q_proj": "model.layers.{layer}.self_attn.q_proj",
    "k_proj": "model.layers.{layer}.self_attn.k_proj",
    "v_proj": "model.layers.{layer}.self_attn.v_proj",
    "o_proj": "model.layers.{layer}.self_attn.o_proj",
    "gate_proj": "model.layers.{layer}.mlp.gate_proj",
    "up_proj": "model.layers.{layer}.mlp.up_proj",
    "down_proj": "model.layers.{layer}.mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf of the parameter tree in a checkpoint.

    A name with `{layer}` stands for one tensor a layer, which the leaf stacks.  `transposed`: the checkpoint has a
    linear map as [out, in], the decoder as [in, out].
    """

    name: str
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` of Hugging Face maps onto the decoder."""

    architecture: str  # the class in `architectures` that has a language-model head and nothing else
    fields: Mapping[str, str]  # ModelConfig's field: the config's, which must be there
    defaults: Mapping[str, Any]  # what transformers takes for fields that a config may leave out
    supported: Mapping[str, tuple[Any, ...]]  # values of other fields that the decoder can run, or the field is absent
    weights: Mapping[tuple[str, ...], Weight]  # by path in the parameter tree


LLAMA = Family(
    architecture="LlamaForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    },
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False},
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
        "partial_rotary_factor": (1,),
    },
    weights={
        ("embed", "embedding"): Weight("model.embed_tokens.weight"),
        ("layers", "attention_norm", "scale"): Weight("model.layers.{layer}.input_layernorm.weight"),
        ("layers", "mlp_norm", "scale"): Weight("model.layers.{layer}.post_attention_layernorm.weight"),
        ("final_norm", "scale"): Weight("model.norm.weight"),
        ("lm_head", "embedding"): Weight("lm_head.weight"),
    }
    | {("layers", m, "kernel"): Weight(f"{name}.weight", transposed=True) for m, name in LINEAR_MAPS.items()},
)

FAMILIES = {"llama": LLAMA}


def family(hf_config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
      ValueError: there is none for its `model_type`.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}; the families supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def model_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a `config.json` describes.

    Fields that it leaves out, or has as null, get the value that transformers gives them.

    Raises:
      ValueError: a model type or a feature that the decoder does not support, or a missing field.
    """
    this = family(hf_config)
    given = {name: value for name, value in hf_config.items() if value is not None}
    missing = [name for name in this.fields.values() if name not in given]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; expected in the config of every {given['model_type']} model")
    _refuse_unsupported(this, given)

    given = {**this.defaults, **given}
    rope = {"rope_theta": given["rope_theta"], **_rope(given)}
    return ModelConfig(
        **{ours: given[theirs] for ours, theirs in this.fields.items()},
        num_kv_heads=given.get("num_key_value_heads", given["num_attention_heads"]),
        head_dim=given.get("head_dim", given["hidden_size"] // given["num_attention_heads"]),
        rms_norm_eps=float(given["rms_norm_eps"]),
        rope=Rope(theta=float(rope["rope_theta"]), scaling=_rope_scaling(rope)),
        tie_embeddings=given["tie_word_embeddings"],
    )


def _refuse_unsupported(this: Family, given: Mapping[str, Any]) -> None:
    architectures = given.get("architectures") or [this.architecture]
    if architectures != [this.architecture]:
        raise ValueError(f"architectures is {architectures}; only {this.architecture} is supported")
    if "quantization_config" in given:
        method = given["quantization_config"].get("quant_method")
        raise ValueError(f"quantization_config ({method}) is not supported: use the checkpoint that is not quantised")
    for name, values in this.supported.items():
        if given.get(name, values[0]) not in values:
            raise ValueError(f"{name}={given[name]!r} is not supported; expected {' or '.join(map(repr, values))}")


def _rope(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the rotary embedding: transformers 5 writes `rope_parameters`, versions before `rope_scaling`."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"rope_parameters of their own for {', '.join(nested)} are not supported")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; expected 1")
    return {name: value for name, value in rope.items() if value is not None}


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))  # `type` is the older name
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; expected 'default' or 'llama3'")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in fields if name not in rope]
    if missing:
        raise ValueError(f"rope_type 'llama3' without {', '.join(missing)}; expected them beside it")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )
