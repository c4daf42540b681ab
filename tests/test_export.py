"""A merged checkpoint is what `transformers` takes it for, and what is read again here."""

import functools
import json
import pathlib
import stat
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from activedpo_jax import layout
from activedpo_jax.huggingface import loading, merged
from activedpo_jax.huggingface.merged import Weights
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.lora import Lora, init_lora
from activedpo_jax.models.quantise import quantise_params
from tests import tiny
from tests.test_families import MODELS
from tests.tiny_hf import load_decoder, tiny_llama, tiny_model, torch_logps
from tests.tiny_tokenizer import CHATML, make_tokenizer

LORA = LoraConfig(rank=4, alpha=16.0, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


def random_adapter(model: Any, config: LoraConfig) -> Lora:
    rng = np.random.default_rng(0)
    zeros = init_lora(model, config, jax.random.key(0))
    return jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), zeros)


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    return found


@pytest.mark.parametrize(
    ("model_type", "changes", "config", "size"),
    [
        ("llama", {"tie_word_embeddings": True}, LoraConfig(rank=8, alpha=32.0), "20KB"),
        ("llama", {"tie_word_embeddings": False}, LoraConfig(rank=4, alpha=8.0, rslora=True), 10_000),
        *((model_type, MODELS[model_type], LORA, "5GB") for model_type in MODELS if model_type != "llama"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_transformers_gives_the_same_log_probs(
    tmp_path: pathlib.Path, model_type: str, changes: dict[str, Any], config: LoraConfig, size: int | str
) -> None:
    base, result = tmp_path / "base", tmp_path / "merged"
    tiny_model(base, model_type, **changes)
    decoder, params = load_decoder(base)
    lora = random_adapter(decoder.config, config)
    batch = tiny.groups(seed=1, count=4, m=2, prompt=9, response=8)
    apply = jax.jit(decoder.clone(lora=config).apply)
    ours = np.asarray(apply({"params": params, "lora": lora}, batch))
    nothing = jax.tree.map(np.zeros_like, lora)
    assert np.abs(ours - apply({"params": params, "lora": nothing}, batch)).max() > 0.1

    merged.save_merged(Weights(params, lora, config), str(base), "", result, jnp.float32, size)
    files = list(result.glob("*.safetensors"))
    if size == "5GB":
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert len(files) > 3 and (result / "model.safetensors.index.json").exists()
    model, report = AutoModelForCausalLM.from_pretrained(
        result, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())  # neither missing nor unexpected
    assert type(model).__name__ == json.loads((base / "config.json").read_text())["architectures"][0]
    np.testing.assert_allclose(ours, torch_logps(model.eval(), batch), rtol=0, atol=1e-4)

    reloaded = loading.load_model(str(result))[1]
    again = np.asarray(apply({"params": reloaded, "lora": nothing}, batch))
    np.testing.assert_allclose(ours, again, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantisation", ["int8", "nf4"])
def test_quantised_weights_are_merged_as_what_they_stand_for(tmp_path: pathlib.Path, quantisation: str) -> None:
    pytest.importorskip("qwix")
    tiny_llama(tmp_path / "base")
    decoder, params = load_decoder(tmp_path / "base")
    params, lora = quantise_params(params, quantisation), random_adapter(decoder.config, LORA)
    batch = tiny.groups(seed=1, count=4, m=2)
    ours = np.asarray(jax.jit(decoder.clone(lora=LORA).apply)({"params": params, "lora": lora}, batch))
    weights = Weights(params, lora, LORA)
    merged.save_merged(weights, str(tmp_path / "base"), "", tmp_path / "out", jnp.float32, "10KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    np.testing.assert_allclose(ours, torch_logps(model, batch), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(folder, tie_word_embeddings=True)
    make_tokenizer(CHATML).save_pretrained(folder)
    GenerationConfig(temperature=0.7, do_sample=True).save_pretrained(folder)
    (folder / "README.md").write_text("of the base model alone")
    return folder


@functools.cache
def loaded(base: pathlib.Path) -> tuple[Any, Any, Lora]:
    config, params = loading.load_model(str(base))
    return config, params, random_adapter(config, LORA)


@pytest.mark.parametrize("size", ["5GB", "10KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_as_they_are(tmp_path: pathlib.Path, tied: bool, size: str) -> None:
    model = tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    params = loading.load_model(str(tmp_path / "base"))[1]
    merged.save_merged(Weights(params), str(tmp_path / "base"), "", tmp_path / "out", jnp.float32, size)
    # As transformers writes them: tied embeddings once.
    written, expected = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    assert ("lm_head.weight" in written) == (not tied)
    assert written.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, written, expected)
    assert len(expected) == len(dict(model.named_parameters()))


def test_shards(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    _, params, lora = loaded(base)
    merged.save_merged(Weights(params, lora, LORA), str(base), "", tmp_path / "out", jnp.float32, 10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    sizes: dict[str, list[int]] = {name: [] for name in files}
    for name, tensor in tensors(tmp_path / "out").items():
        sizes[index["weight_map"][name]].append(tensor.nbytes)
    assert all(sum(file) <= 10_000 or len(file) == 1 for file in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    # Layers are together, in order: whoever loads file by file needs few of them at a time.
    of_layers = [index["weight_map"][f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    assert of_layers == sorted(of_layers) and len(set(of_layers)) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once(tmp_path: pathlib.Path, base: pathlib.Path, dtype: str) -> None:
    config, params, lora = loaded(base)
    coarse = jax.tree.map(lambda x: x.astype(dtype), params)
    small = jax.tree.map(lambda x: x * 0.05, lora)
    merged.save_merged(Weights(coarse, small, LORA), str(base), "", tmp_path / "out", dtype)
    written = tensors(tmp_path / "out")
    assert {x.dtype.name for x in written.values()} == {dtype}
    half_a_step = 2.0 ** -{"bfloat16": 8, "float16": 11}[dtype]
    for module in LORA.target_modules:
        a, b = (np.asarray(small["layers"][module][key], np.float64) for key in "ab")
        kernel = np.asarray(coarse["layers"][module]["kernel"], np.float64)
        exact = kernel.swapaxes(1, 2) + 4.0 * np.einsum("lor,lri->loi", b, a)
        for layer, wanted in enumerate(exact):
            name = (
                f"model.layers.{layer}.{'mlp' if module in ('up_proj', 'down_proj') else 'self_attn'}.{module}.weight"
            )
            error = np.abs(written[name].astype(np.float64) - wanted)
            assert (error <= half_a_step * np.abs(wanted) * (1 + 1e-3) + 1e-7).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_weights_cut_over_devices(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    _, params, lora = loaded(base)
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    cut_params, cut_lora = (jax.device_put(x, layout.weight_shardings(mesh, x)) for x in (params, lora))
    merged.save_merged(Weights(cut_params, cut_lora, LORA), str(base), "", tmp_path / "cut", jnp.float32)
    merged.save_merged(Weights(params, lora, LORA), str(base), "", tmp_path / "whole", jnp.float32)
    found, expected = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)


def test_what_belongs_to_the_model_comes_along(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    _, params, lora = loaded(base)
    merged.save_merged(Weights(params, lora, LORA), str(base), "", tmp_path / "out", jnp.bfloat16)
    ours, theirs = loading.load_tokenizer(str(tmp_path / "out")), loading.load_tokenizer(str(base))
    assert ours("What colour is it?")["input_ids"] == theirs("What colour is it?")["input_ids"]
    assert ours.chat_template == CHATML
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.7
    before, after = (json.loads((x / "config.json").read_text()) for x in (base, tmp_path / "out"))
    assert before.pop("dtype") == "float32" and after.pop("dtype") == "bfloat16"
    assert before == after
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"README.md"}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}) == 1


def test_a_config_of_older_versions_of_transformers_says_the_same(tmp_path: pathlib.Path) -> None:
    tiny_llama(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps({**config, "torch_dtype": "float32"}))
    params = loading.load_model(str(tmp_path / "base"))[1]
    merged.save_merged(Weights(params), str(tmp_path / "base"), "", tmp_path / "out", jnp.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_hub_names_from_the_cache(tmp_path: pathlib.Path, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / commit).symlink_to(base)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, params, lora = loaded(base)
    merged.save_merged(Weights(params, lora, LORA), "someone/tiny", "v1", tmp_path / "out", jnp.float32)
    assert loading.load_tokenizer(str(tmp_path / "out")).chat_template == CHATML
    with pytest.raises(ValueError, match=r"someone/tiny \(revision v2\): neither"):
        merged.save_merged(Weights(params, lora, LORA), "someone/tiny", "v2", tmp_path / "other", jnp.float32)
    assert not (tmp_path / "other").exists()


def test_a_killed_export_leaves_nothing_that_looks_whole(
    tmp_path: pathlib.Path, base: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params, lora = loaded(base)
    directory = tmp_path / "runs" / "merged"
    weights = Weights(params, lora, LORA)
    save = functools.partial(merged.save_merged, weights, str(base), "", directory, jnp.float32, 20_000)
    replace, writes = merged.os.replace, {name: getattr(merged, name) for name in ("_write", "write_atomic")}

    def killed(name: str, survived: int, path: pathlib.Path, content: Any) -> None:
        if len(list(path.parent.iterdir())) == survived:
            raise KeyboardInterrupt
        writes[name](path, content)

    for survived in (0, 2, 7):  # files
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in writes:
                patch.setattr(merged, name, functools.partial(killed, name, survived))
            save()
        assert not directory.exists()

    def killed_at_last(source: pathlib.Path, target: pathlib.Path) -> None:
        if target == directory:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merged.os, "replace", killed_at_last)
        save()
    assert not directory.exists()
    save()
    assert [path.name for path in directory.parent.iterdir()] == ["merged"]
    loading.load_model(str(directory))


def test_what_cannot_be_written_is_refused(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    config, params, lora = loaded(base)
    out = tmp_path / "out"
    save = functools.partial(merged.save_merged, base_model=str(base), revision="", directory=out, dtype=jnp.float32)
    other = LoraConfig(8, 16.0, LORA.target_modules)
    with pytest.raises(ValueError, match=r"layers/down_proj/a of the adapter has shape \(3, 4, 48\); .* \(3, 8, 48\)"):
        save(Weights(params, lora, other))
    with pytest.raises(ValueError, match=r"layers/up_proj/a of the adapter has shape \(3, 4, 32\); .* it has None"):
        save(Weights(params, lora, LoraConfig(4, 16.0, ("q_proj", "v_proj", "o_proj", "down_proj"))))
    with pytest.raises(
        ValueError, match=rf"final_norm/scale of the parameters has shape \(4,\); by the config of {base}"
    ):
        save(Weights({**params, "final_norm": {"scale": jnp.ones(4)}}, lora, LORA))
    with pytest.raises(ValueError, match="dtype: got int8, expected one of float32, bfloat16, float16"):
        save(Weights(params, lora, LORA), dtype=jnp.int8)
    with pytest.raises(ValueError, match="nowhere: no such directory; .*set config.model.path"):
        save(Weights(params, lora, LORA), base_model=str(tmp_path / "nowhere"))
    large = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * 1e6}}
    with pytest.raises(
        ValueError, match="tensor model.norm.weight of .*out has entries that are not finite in float16"
    ):
        save(Weights(large, lora, LORA), dtype=jnp.float16)
    assert not out.exists()

    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: already there; remove it"):
        save(Weights(params, lora, LORA))
    with pytest.raises(ValueError, match="already there"):
        save(Weights(params, lora, LORA), directory=base)
    assert (out / "notes.txt").read_text() == "mine"
