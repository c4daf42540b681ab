"""Every family gives the log-probs that transformers gives, reads configs as it does, or refuses them by name."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma3ForCausalLM

from activedpo_jax.huggingface import loading
from activedpo_jax.huggingface.families import FAMILIES, model_config
from activedpo_jax.models.config import ModelConfig, Rope
from activedpo_jax.models.decoder import Decoder
from tests import tiny
from tests.test_features import BOUND, reference, responses_of
from tests.tiny_hf import load_decoder, pad, tiny_model, torch_logps

PROMPT, RESPONSE, WINDOW = 12, 9, 5
LOCAL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# Of every family a model with all that sets it apart, and what its decoder would be without each of these features.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": LOCAL[1:], "head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 50,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 50,
        "sliding_window": WINDOW,
        "num_hidden_layers": 4,
        "layer_types": LOCAL,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
    "smollm3": {
        "no_rope_layer_interval": 2,
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "olmo2": {},
}
WITHOUT: dict[str, list[dict[str, Any]]] = {
    "llama": [{"rope": Rope(500.0)}],
    "mistral": [{"window": WINDOW + 1}],
    "qwen2": [{"qkv_bias": False}, {"window": None}, {"local": ()}],
    "qwen3": [{"qk_norm": "none"}, {"local": ()}],
    "gemma": [{"norm_offset": 0.0}, {"scale_embeddings": False}, {"activation": "silu"}],
    "gemma2": [
        {"attention_softcap": None},
        {"logit_softcap": None},
        {"query_scale": None},
        {"norms": "pre"},
        {"window": None},
        {"local": ()},
    ],
    "gemma3_text": [
        {"qk_norm": "none"},
        {"logit_softcap": None},
        {"local": ()},
        {"local_rope": None},
        {"rope": Rope(500.0)},
        {"rope": Rope(20.0, factor=4.0)},
    ],
    "smollm3": [{"unrotated": ()}, {"window": None}, {"local": ()}],
    "olmo2": [{"norms": "pre"}, {"norms": "both"}, {"qk_norm": "none"}],
}


def test_every_family_is_tested() -> None:
    assert MODELS.keys() == WITHOUT.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", MODELS)
def test_log_probs_equal_those_of_transformers(tmp_path: pathlib.Path, model_type: str) -> None:
    """And no longer do when any one of the family's features is left out."""
    model = tiny_model(tmp_path, model_type, **MODELS[model_type])
    decoder, params = load_decoder(tmp_path)
    batch = tiny.groups(seed=1, count=5, m=3, prompt=PROMPT, response=RESPONSE)
    assert min(batch.prompt_len) < WINDOW < max(batch.prompt_len) and max(batch.response_len.ravel()) > WINDOW
    expected = torch_logps(model, batch)
    present = expected != 0
    assert np.std(expected[present]) > 0.5  # far from a uniform distribution

    layers = params["layers"]
    # What OLMo 2 would be with norms before its maps needs some norms.
    spare = {"attention_norm": layers.get("attention_post_norm"), "mlp_norm": layers.get("mlp_post_norm")}
    params["layers"] = {**spare, **layers} if decoder.config.norms == "post" else layers

    def error(decoder: Decoder) -> float:
        logps = np.asarray(jax.jit(decoder.apply)({"params": params}, batch))
        return float(np.abs(logps - expected).max())

    assert error(decoder) < 1e-4
    for feature in WITHOUT[model_type]:
        changed = dataclasses.replace(decoder.config, **feature)
        assert changed != decoder.config
        assert error(decoder.clone(config=changed)) > 1e-2, feature


# --- Configs


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 30}
    return {"model_type": model_type, **sizes, "num_attention_heads": 32, **changes}


GEMMA3_ROPE = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [(model_type, {}) for model_type in FAMILIES]
    + [
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}, "num_key_value_heads": None}),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}, "hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"head_dim": 64, "pretraining_tp": 2, "attention_dropout": 0.1, "attention_bias": False}),
        ("mistral", {"sliding_window": None, "rope_theta": 1e6}),
        ("mistral", {"sliding_window": 64, "num_key_value_heads": 16}),
        ("qwen2", {"use_sliding_window": True, "rope_theta": 1e6, "rope_scaling": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "head_dim": 64}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 500.0}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 64}),
        ("gemma2", {"layer_types": ["full_attention"] * 15 + ["sliding_attention"] * 15, "query_pre_attn_scalar": 144}),
        ("gemma2", {"layer_types": ["full_attention"] * 30, "sliding_window": None, "tie_word_embeddings": False}),
        ("gemma3_text", {"sliding_window_pattern": 4, "sliding_window": 64}),
        ("gemma3_text", {"sliding_window_pattern": 2, **GEMMA3_ROPE, "final_logit_softcapping": 20.0}),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_theta": 50.0}}, "rope_theta": 5e5}),
        ("smollm3", {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 64}),
        ("smollm3", {"no_rope_layers": [0, 1, 1] * 10, "use_sliding_window": False, "sliding_window": 64}),
        ("smollm3", {"no_rope_layers": [0, 1, 1] * 11, "pretraining_tp": 2, "max_window_layers": 28}),
        ("olmo2", {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "num_key_value_heads": 8}),
    ],
    ids=str,
)
def test_configs_are_read_as_transformers_reads_them(model_type: str, changes: dict[str, Any]) -> None:
    """What is left out, and what versions before 5 wrote otherwise."""
    hf_config = config_of(model_type, **changes)
    full = AutoConfig.for_model(**json.loads(json.dumps(hf_config))).to_dict()
    assert len(full) > 2 * len(hf_config)
    if full.get("sliding_window_pattern") is not None:  # kept beside the layer_types that it was turned into
        full["sliding_window_pattern"] = None
    if model_type == "llama" and "num_key_value_heads" in changes:
        assert full["num_key_value_heads"] == 32
    assert model_config(hf_config) == model_config(full)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma3", {}, "model_type is 'gemma3'; .*gemma3_text"),
        ("mixtral", {}, "model_type is 'mixtral'"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "only Qwen2ForCausalLM"),
        ("olmo2", {"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\)"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, r"code of the model's own \(modeling_x.X\)"),
        # Attention.
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("olmo2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("mistral", {"layer_types": ["sliding_attention"] * 30}, "layer_types="),
        ("llama", {"attention_chunk_size": 8192}, "attention_chunk_size=8192"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm=True"),
        # Kinds of layers.
        ("qwen3", {"layer_types": ["chunked_attention"] * 30}, "layer_types has chunked_attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 29}, "29 entries; expected num_hidden_layers=30"),
        ("gemma3_text", {"sliding_window": None}, "sliding_attention, but sliding_window=None"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 30}, "use_sliding_window=False"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        ("llama", {"no_rope_layers": [1, 0] * 15}, "no_rope_layers="),
        ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
        # Rotary embeddings.
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
        ("qwen2", {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24]}}, "with mrope_section"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type 'yarn'"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters has rope_theta; .*full_attention"),
        ("gemma2", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "for full_attention"),
        ("gemma", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        # Activations, experts, multipliers.
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "hidden_act='silu', hidden_activ"),
        ("qwen3", {"num_experts": 64}, "num_experts=64"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config="),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_have_is_refused_by_name(
    tmp_path: pathlib.Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    model_config(config_of("llama" if model_type not in FAMILIES else model_type))  # fine without
    (tmp_path / "config.json").write_text(json.dumps(config_of(model_type, **changes)))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        loading.load_config(str(tmp_path))


# --- Probe features

GEMMA3_LIKE = dataclasses.replace(
    tiny.MODEL,
    num_layers=4,
    activation="gelu_tanh",
    scale_embeddings=True,
    qkv_bias=True,
    norms="both",
    qk_norm="head",
    norm_offset=1.0,
    query_scale=0.5,
    attention_softcap=2.0,
    logit_softcap=3.0,
    rope=Rope(500.0, factor=4.0),
    unrotated=(False, False, False, True),
    window=4,
    local=(True, False, True, True),
    local_rope=Rope(20.0),
)
OLMO2_LIKE = dataclasses.replace(tiny.MODEL, norms="post", qk_norm="width", tie_embeddings=False)


@pytest.mark.parametrize("config", [GEMMA3_LIKE, OLMO2_LIKE], ids=["like gemma 3", "like olmo 2"])
@pytest.mark.slow
def test_features_equal_per_example_gradients(config: ModelConfig) -> None:
    decoder, params, lora = tiny.model(config=config)

    def away_from_initial(path: Any, x: jax.Array) -> jax.Array:
        noise = jax.random.uniform(jax.random.key(len(str(path))), x.shape, minval=-0.5, maxval=0.5)
        base = {"scale": 1 - config.norm_offset + noise, "bias": noise}
        return base.get(path[-1].key, x)

    params = jax.tree_util.tree_map_with_path(away_from_initial, params)
    batch = tiny.groups(0, 4, m=3)
    got = responses_of(decoder, params, lora, batch)
    assert tiny.relative_error(got, reference(decoder, params, lora, batch)) < BOUND


# --- A real model


def test_gemma3_log_probs_equal_those_of_transformers() -> None:
    folder = os.environ.get("ACTIVEDPO_GEMMA3", "")
    if not pathlib.Path(folder, "config.json").is_file():
        pytest.skip("set ACTIVEDPO_GEMMA3 to a directory that holds Gemma-3-270M")
    tokenizer: Any = loading.load_tokenizer(folder)
    tale = "The fox who lived by the river had never seen so much snow, and she said so to the heron. " * 30
    talks = [
        ("What is the capital of France?", [" The capital of France is Paris.", " I do not know"]),
        (tale, [" The heron did not answer.", " " + tale[:100]]),
    ]
    prompt_ids = [tokenizer(q)["input_ids"] for q, _ in talks]
    response_ids = [[tokenizer(r, add_special_tokens=False)["input_ids"] for r in rs] for _, rs in talks]
    decoder, params = load_decoder(pathlib.Path(folder))
    assert decoder.config.window is not None and len(prompt_ids[1]) > decoder.config.window
    batch = pad(prompt_ids, response_ids)
    logps = np.asarray(jax.jit(decoder.apply)({"params": params}, batch))
    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # On the long prompt, with log-probs down to −29, transformers in float32 is 2e-4 away from itself in float64.
    np.testing.assert_allclose(logps, torch_logps(model, batch), rtol=1e-5, atol=1e-4)
