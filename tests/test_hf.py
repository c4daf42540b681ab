"""Models as `transformers` saves them are read right, or refused by name."""

import json
import math
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from activedpo_jax import layout
from activedpo_jax.huggingface import hub, loading, tensors
from activedpo_jax.huggingface.families import model_config
from activedpo_jax.models.config import ModelConfig, RopeScaling
from tests import tiny
from tests.tiny_hf import load_decoder, pad, tiny_llama, torch_logps
from tests.tiny_tokenizer import CHATML, make_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Of the four wavelengths of a head of 8, the shortest is kept, the next interpolated, and two are stretched.
    "original_max_position_embeddings": 64,
}


# --- Log-probs


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"tie_word_embeddings": True}, 9),
        ({"tie_word_embeddings": False, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}, 9),
        ({"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 16}, 9),
        ({"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0}}, 100),
        ({"tie_word_embeddings": True, "rope_parameters": LLAMA3}, 400),
    ],
    ids=["tied", "untied, no groups", "one key head, own head size", "rope_theta", "llama3 rope, long"],
)
def test_log_probs_equal_those_of_transformers(tmp_path: pathlib.Path, changes: Any, prompt: int) -> None:
    model = tiny_llama(tmp_path, **changes)
    decoder, params = load_decoder(tmp_path)
    batch = tiny.groups(seed=1, count=4, m=3, prompt=prompt, response=8)
    assert len(set(batch.prompt_len)) > 2 and len(set(batch.response_len.ravel())) > 2
    logps = np.asarray(jax.jit(decoder.apply)({"params": params}, batch))
    np.testing.assert_allclose(logps, torch_logps(model, batch), rtol=0, atol=1e-4)


def test_smollm2_log_probs_equal_those_of_transformers() -> None:
    folder = os.environ.get("ACTIVEDPO_SMOLLM2", "")
    if not pathlib.Path(folder, "config.json").is_file():
        pytest.skip("set ACTIVEDPO_SMOLLM2 to a directory that holds SmolLM2-135M-Instruct")
    tokenizer: Any = loading.load_tokenizer(folder)
    talks = [
        ("What is the capital of France?", ["The capital of France is Paris.", "I do not know"]),
        ("Name three animals, and say of each in one sentence where it lives.", ["A cat. " * 20, "Dog, cow"]),
    ]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q, _ in talks
    ]
    prompt_ids = [tokenizer(p)["input_ids"] for p in prompts]
    response_ids = [[[*tokenizer(r)["input_ids"], tokenizer.eos_token_id] for r in rs] for _, rs in talks]
    batch = pad(prompt_ids, response_ids)
    decoder, params = load_decoder(pathlib.Path(folder))
    logps = np.asarray(jax.jit(decoder.apply)({"params": params}, batch))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_allclose(logps, torch_logps(model, batch), rtol=0, atol=1e-4)


# --- Tensors


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_tensor_comes_to_its_place(tmp_path: pathlib.Path, tied: bool, shard: str) -> None:
    model = tiny_llama(tmp_path, shard, tie_word_embeddings=tied)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard == "10KB")
    config, params = loading.load_model(str(tmp_path))
    tensors = {name: t.numpy() for name, t in model.state_dict().items()}

    def stacked(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{i}.{name}.weight"] for i in range(3)])

    kernels = {f"{m}_proj": stacked(f"self_attn.{m}_proj") for m in "qkvo"}
    kernels |= {f"{m}_proj": stacked(f"mlp.{m}_proj") for m in ("gate", "up", "down")}
    expected: dict[str, Any] = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "layers": {
            "attention_norm": {"scale": stacked("input_layernorm")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm")},
            **{name: {"kernel": kernel.swapaxes(1, 2)} for name, kernel in kernels.items()},
        },
        "final_norm": {"scale": tensors["model.norm.weight"]},
    }
    if not tied:
        expected["lm_head"] = {"embedding": tensors["lm_head.weight"]}
    assert config.tie_embeddings == tied
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_checkpoints(tmp_path: pathlib.Path, dtype: str) -> None:
    model = tiny_llama(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    _, params = loading.load_model(str(tmp_path), dtype=jnp.dtype(dtype))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
    kernel = np.asarray(params["layers"]["k_proj"]["kernel"][1], np.float32)
    weight = model.model.layers[1].self_attn.k_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel, weight.T)


@pytest.mark.parametrize("piece_bytes", [1, 500, tensors.PIECE_BYTES], ids=["a row", "some rows", "whole"])
def test_parameters_are_placed_as_asked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    """However a tensor is cut on its way, and with more devices than one that hold the same part of it."""
    model = tiny_llama(tmp_path, vocab_size=96, tie_word_embeddings=False)
    monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
    shares = []

    def put_tensor(tensor: tensors.Tensor, sharding: jax.sharding.Sharding) -> jax.Array:
        shares.append((len(tensor.shape), math.prod(tensor.shape) / math.prod(sharding.shard_shape(tensor.shape))))
        return tensors.put_tensor(tensor, sharding)

    monkeypatch.setattr(loading, "put_tensor", put_tensor)
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    _, params = loading.load_model(str(tmp_path), shardings=lambda shapes: layout.weight_shardings(mesh, shapes))
    assert set(shares) == {(1, 1), (2, 4)}  # of a matrix a device never gets more than what it keeps
    wanted = layout.weight_shardings(mesh, params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, wanted))
    kernel = params["layers"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 16, 24)
    weights = [layer.mlp.up_proj.weight.detach().numpy().T for layer in model.model.layers]
    np.testing.assert_array_equal(kernel, np.stack(weights))
    np.testing.assert_array_equal(params["lm_head"]["embedding"], model.lm_head.weight.detach().numpy())
    np.testing.assert_array_equal(params["final_norm"]["scale"], model.model.norm.weight.detach().numpy())
    assert params["lm_head"]["embedding"].addressable_shards[0].data.shape == (24, 32)  # rows, over fsdp and tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--dtype=bfloat16"], ["--dtype=float32", "--shard=300MB"]], ids=["one", "several"]
)
def test_a_billion_parameters_load_within_the_bound_on_memory(options: list[str]) -> None:
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.loading", *options]
    done = subprocess.run(command, cwd=root, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ratio 0." in done.stdout


def edit(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_say_nothing_new_are_left_out(tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path, tie_word_embeddings=True)
    clean = loading.load_model(str(tmp_path))[1]
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}))
    jax.tree.map(np.testing.assert_array_equal, loading.load_model(str(tmp_path))[1], clean)


def test_a_head_unlike_the_embeddings_that_it_is_tied_to_is_refused(tmp_path: pathlib.Path) -> None:
    """transformers 5 unties them with a warning, versions before it drop the head."""
    tiny_llama(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    with pytest.raises(ValueError, match="lm_head.weight differs from .*tie_word_embeddings=true"):
        loading.load_model(str(tmp_path))


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), rf"missing tensor {GATE}, expected with shape \[48, 32\]"),
        (lambda t: t.pop("lm_head.weight"), r"missing tensor lm_head.weight, expected with shape \[97, 32\]"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), rf"{GATE} has shape \[32, 48\].*\[48, 32\]"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32)}),
            r"model.safetensors: unexpected tensor model.layers.0.self_attn.q_proj.bias of shape \[32\]",
        ),
        # One layer more than the config has.
        (lambda t: t.update({GATE.replace("1", "3"): t[GATE]}), "unexpected tensor model.layers.3.mlp.gate_proj"),
        (lambda t: t.update({NORM: np.ones(32, np.int8)}), f"model.safetensors: tensor {NORM} is I8; expected .*F32"),
    ],
    ids=["missing", "missing head", "misshapen", "extra", "extra layer", "quantised"],
)
def test_a_checkpoint_that_does_not_match_is_refused(tmp_path: pathlib.Path, change: Any, message: str) -> None:
    tiny_llama(tmp_path, tie_word_embeddings=False)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        loading.load_model(str(tmp_path))


def test_of_many_faults_the_first_are_named_and_the_others_counted(tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path)
    edit(tmp_path, lambda t: [t.pop(name) for name in list(t) if "mlp" in name])
    with pytest.raises(ValueError, match="and 4 more such"):
        loading.load_model(str(tmp_path))


def cut_short(folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_torch_weights(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "model.safetensors: not a whole safetensors file"),
        (only_torch_weights, "model.safetensors: no such file.*pytorch_model.bin"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
    ids=["cut short", "torch only", "no config"],
)
def test_an_incomplete_directory_is_refused(tmp_path: pathlib.Path, damage: Any, message: str) -> None:
    tiny_llama(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        loading.load_model(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path, "10KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: no such file"):
        loading.load_model(str(tmp_path))


# --- Configs

MINIMAL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    full = LlamaConfig(**{k: v for k, v in MINIMAL.items() if k != "model_type"}).to_dict()
    assert len(full) > 2 * len(MINIMAL)
    assert model_config(MINIMAL) == model_config(full)
    assert model_config(MINIMAL) == ModelConfig(97, 32, 48, 3, 4, 4, 8, rms_norm_eps=1e-6, tie_embeddings=False)


def test_rope_settings_of_old_and_new_transformers() -> None:
    fields = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = {**MINIMAL, "rope_theta": 5e5, "rope_scaling": fields}
    older = {**MINIMAL, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **fields}}
    new = {**MINIMAL, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    for hf_config in (old, older, new):
        config = model_config(hf_config)
        assert config.rope.theta == 5e5
        assert config.rope.scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert model_config({**MINIMAL, "rope_theta": 5e5, "rope_scaling": None}).rope.scaling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; .*llama"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' without factor"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 3]}}, "'default' with mrope_section"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "without low_freq_factor, high_freq_factor"),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_have_is_refused_by_name(
    tmp_path: pathlib.Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MINIMAL, **change}))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        loading.load_config(str(tmp_path))


# --- Places


def test_a_misspelt_directory_is_not_taken_for_a_hub_name(tmp_path: pathlib.Path) -> None:
    for load in (loading.load_config, loading.load_tokenizer, loading.load_model):
        with pytest.raises(ValueError, match="no such directory"):
            load(str(tmp_path / "nothing"))


def test_hub_names_from_the_cache_without_a_network(tmp_path: pathlib.Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    tiny_llama(snapshot, "10KB")
    make_tokenizer(CHATML).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)
    program = (
        "import sys; sys.modules['torch'] = None\n"  # an installation without torch must do
        "from activedpo_jax.huggingface import loading\n"
        "for revision in ('', 'v1'):\n"
        "    print(loading.load_config('someone/tiny', revision).num_layers,\n"
        "          loading.load_model('someone/tiny', revision)[1]['embed']['embedding'].shape,\n"
        "          loading.load_tokenizer('someone/tiny', revision).eos_token)\n"
        "for load in (loading.load_config, loading.load_tokenizer, loading.load_model):\n"
        "    try: load('someone/tiny', 'v2')\n"
        "    except ValueError as error: print('refused', 'v2' in str(error) or error)\n"
    )
    here = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **here}, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 (97, 32) </s>"] * 2 + ["refused True"] * 3


@pytest.fixture
def hub_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The snapshot of someone/tiny in a cache of ours, offline; whoever asks the network all the same fails."""

    def connect(*args: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_a_model_that_is_not_cached_is_an_error_offline(hub_cache: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="someone/other: neither a directory here, nor .* config.model.path"):
        loading.load_model("someone/other")


def test_a_shard_that_is_not_cached_is_named_offline(hub_cache: pathlib.Path) -> None:
    tiny_llama(hub_cache, "10KB")
    shard = sorted(hub_cache.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: no such file"):
        loading.load_model("someone/tiny")


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["single", "sharded"])
def test_of_the_hub_only_what_is_needed_is_downloaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    tiny_llama(tmp_path / "hub", shard)
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"large")
    weights = sorted(file.name for file in (tmp_path / "hub").glob("*.safetensors"))
    here, downloads = tmp_path / "here", []
    here.mkdir()

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/tiny", "v1")
        wanted = huggingface_hub.utils.filter_repo_objects(
            [file.name for file in (tmp_path / "hub").iterdir()], allow_patterns=allow_patterns
        )
        for file in sorted(set(wanted) - {file.name for file in here.iterdir()}):
            shutil.copy(tmp_path / "hub" / file, here)
            downloads.append(file)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loading.load_config("someone/tiny", "v1")
    assert downloads == ["config.json"]
    _, params = loading.load_model("someone/tiny", "v1")
    assert sorted(downloads) == sorted(["config.json", *weights, *["model.safetensors.index.json"] * (shard == "10KB")])
    jax.tree.map(np.testing.assert_array_equal, params, loading.load_model(str(tmp_path / "hub"))[1])


def test_a_bar_counts_the_tensors(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = tiny_llama(tmp_path, tie_word_embeddings=False)
    loading.load_model(str(tmp_path))
    count = len(model.state_dict())
    assert f"loading {tmp_path}" in (bar := capsys.readouterr().err) and f"/{count} " in bar


def test_tokenizers(tmp_path: pathlib.Path) -> None:
    saved = make_tokenizer(CHATML)
    saved.save_pretrained(tmp_path / "chat")
    loaded = loading.load_tokenizer(str(tmp_path / "chat"))
    text = "What colour is the sky?"
    assert loaded(text)["input_ids"] == saved(text)["input_ids"]
    assert loaded.chat_template == CHATML
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no tokenizer"):
        loading.load_tokenizer(str(tmp_path / "empty"))


def test_a_stale_index_beside_the_weights_is_not_read(tmp_path: pathlib.Path) -> None:
    """The single file wins, as in transformers."""
    tiny_llama(tmp_path, max_shard_size="20KB", tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    index = (tmp_path / "model.safetensors.index.json").read_bytes()
    old = {path.name: path.read_bytes() for path in tmp_path.glob("model-*.safetensors")}
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    expected = LlamaForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(loading.load_model(str(tmp_path))[1]["embed"]["embedding"], expected)
    np.testing.assert_array_equal(expected, model.model.embed_tokens.weight.detach().numpy())


def test_a_tied_table_may_be_saved_as_the_head_alone(tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path, tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    before = loading.load_model(str(tmp_path))[1]
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, loading.load_model(str(tmp_path))[1], before)


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"])
@pytest.mark.parametrize("size", [0, -1, "4"])
def test_sizes_that_are_none_are_named(name: str, size: Any) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4).to_dict()
    with pytest.raises(ValueError, match=f"{name} is {size!r}; expected a whole number above 0"):
        model_config({**config, name: size})


def test_a_config_that_is_no_object_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: got a list"):
        loading.load_config(str(tmp_path))


def test_end_of_sequence_tokens(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 5]}')
    assert loading.eos_token_ids(str(tmp_path)) == (3, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert loading.eos_token_ids(str(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").write_text("{}")
    assert loading.eos_token_ids(str(tmp_path)) == (3, 5)


def test_fingerprints_are_of_the_content(tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = hub.fingerprint(str(tmp_path / "one"), "")
    assert first == hub.fingerprint(str(tmp_path / "two"), "")
    for name in ("model.safetensors", "config.json"):
        file = tmp_path / "two" / name
        before = file.read_bytes()
        file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        assert first != hub.fingerprint(str(tmp_path / "two"), "")
        file.write_bytes(before)


def test_large_files_are_told_apart_without_being_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_BLOCK_BYTES", 4)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10_000))
    first = hub.fingerprint(str(tmp_path), "")
    for place in (0, 9_999):
        file.write_bytes(bytes(place) + b"x" + bytes(9_999 - place))
        assert hub.fingerprint(str(tmp_path), "") != first
