"""The fields of Hugging Face configs that several families share: rotary embeddings, kinds of layers, activations.

Each is read as transformers reads it; `transformers` 5 and the versions before it write some of them differently.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from activedpo_jax.models.config import Rope, RopeScaling

Fields = Mapping[str, Any]

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# By `rope_type`, the fields that go with it.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Fields that change what some model computes, with the values at which they do not; null never does.  A family that
# reads a field supports it.  Any other refuses it, even where transformers would ignore it: whoever wrote the config
# then meant a model other than the one that transformers runs.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    # attention
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "layer_types": (),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    # rotary embedding
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "use_mrope": (False,),
    # feed-forward maps and the whole
    "mlp_bias": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "final_logit_softcapping": (),
    "per_layer_config": (),
}


def refuse_unsupported(hf_config: Fields, architecture: str, supported: Collection[str]) -> None:
    """Refuses a `config.json` with a feature that the family does not have.

    Args:
      supported: the fields that the family reads.

    Raises:
      ValueError: names the field, its value, and what was expected.
    """
    architectures = hf_config.get("architectures") or [architecture]
    if architectures != [architecture]:
        raise ValueError(f"architectures is {architectures}; only {architecture} is supported")
    code = (hf_config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if code is not None:
        raise ValueError(f"auto_map names code of the model's own ({code}), which is not supported")
    quantisation = hf_config.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method")
        raise ValueError(f"quantization_config ({method}) is not supported: use the checkpoint that is not quantised")
    for name, values in _WITHOUT_EFFECT.items():
        value = hf_config.get(name)
        if name == "sliding_window" and hf_config.get("use_sliding_window") is False:
            continue
        if value is not None and name not in supported and value not in values:
            expected = " or ".join([*map(repr, values), "no such field"])
            raise ValueError(f"{name}={value!r} is not supported; expected {expected}")


def activation(config: Fields) -> str:
    """`ModelConfig.activation`; Gemma's configs have it under two names, which must not contradict each other."""
    kinds = {}
    for name in ("hidden_act", "hidden_activation"):
        if (value := config.get(name)) is not None:
            # The first Gemma's configs say gelu and mean its approximation, and transformers reads them so.
            legacy = config["model_type"] == "gemma" and (name, value) == ("hidden_act", "gelu")
            kinds[name] = "gelu_pytorch_tanh" if legacy else value
    kind, *others = kinds.values()
    if kind not in _ACTIVATIONS or set(others) - {kind}:
        found = ", ".join(f"{name}={value!r}" for name, value in kinds.items())
        raise ValueError(f"{found} is not supported; expected {' or '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[kind]


# --- Layers that differ


def local_layers(config: Fields, default: Callable[[int], bool]) -> Fields:
    """`window` and `local` of `ModelConfig`: from `layer_types`, or if that is missing, from `default` layer by layer.

    Raises:
      ValueError: another kind of layer, the wrong number of them, or local layers without a window.
    """
    count, window, kinds = config["num_hidden_layers"], config["sliding_window"], config["layer_types"]
    if kinds is None:
        kinds = ["sliding_attention" if default(i) else "full_attention" for i in range(count)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types has {', '.join(unknown)}; expected full_attention or sliding_attention")
    if len(kinds) != count:
        raise ValueError(f"layer_types has {len(kinds)} entries; expected num_hidden_layers={count}")
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(local):
        return {}
    switch = config.get("use_sliding_window", True)
    if window is None or not switch:
        raise ValueError(f"layer_types has sliding_attention, but sliding_window={window}, use_sliding_window={switch}")
    return {"window": window, "local": local}


def unrotated_layers(config: Fields) -> tuple[bool, ...]:
    """`ModelConfig.unrotated`: from `no_rope_layers`, which despite its name has 1 for the layers that are rotated."""
    count, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotated = config["no_rope_layers"]
    if rotated is None:
        rotated = [(i + 1) % interval != 0 for i in range(count)]
    if len(rotated) < count:
        raise ValueError(f"no_rope_layers has {len(rotated)} entries; expected num_hidden_layers={count}")
    return tuple(not has for has in rotated[:count])


# --- Rotary embeddings


def one_rope(config: Fields) -> Rope:
    """The same in all layers: transformers 5 writes `rope_parameters`, earlier ones `rope_scaling` and `rope_theta`."""
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [name for name, value in settings.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"rope_parameters of their own for {', '.join(nested)} are not supported")
    return _rope(settings, config["rope_theta"], config)


def two_ropes(config: Fields) -> Fields:
    """`rope` and `local_rope` of `ModelConfig`: `rope_parameters` has one for each kind of layer.

    Before transformers 5, `rope_scaling` and `rope_theta` were for the layers that see everything, and
    `rope_local_base_freq` for local ones.
    """
    nested = config.get("rope_parameters") or {}
    unknown = sorted(nested.keys() - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"rope_parameters has {', '.join(unknown)}; expected full_attention and sliding_attention")
    everywhere = {**(nested.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = nested.get("sliding_attention") or {}
    return {
        "rope": _rope(everywhere, config["rope_theta"], config),
        "local_rope": _rope(local, config["rope_local_base_freq"], config),
    }


def _rope(settings: Fields, theta: float, config: Fields) -> Rope:
    settings = {name: value for name, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))  # `type` is the older name
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"rope_type {kind!r} is not supported; expected {' or '.join(map(repr, _ROPE_FIELDS))}")
    if kind == "llama3" and config.get("original_max_position_embeddings") is not None:
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    missing = [name for name in _ROPE_FIELDS[kind] if name not in settings]
    if missing:
        raise ValueError(f"rope_type {kind!r} without {', '.join(missing)}; expected beside it")
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor={settings['partial_rotary_factor']} is not supported; expected 1")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    unknown = sorted(settings.keys() - known - set(_ROPE_FIELDS[kind]))
    if unknown:
        raise ValueError(f"rope_type {kind!r} with {', '.join(unknown)} is not supported; expected without")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=float(settings["factor"]),
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_max_position=int(settings["original_max_position_embeddings"]),
        )
    factor = float(settings["factor"]) if kind == "linear" else 1.0
    return Rope(theta=float(settings.get("rope_theta", theta)), factor=factor, scaling=scaling)
