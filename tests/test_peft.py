"""An exported adapter is what `peft` takes it for."""

import dataclasses
import json
import pathlib
import stat
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from activedpo_jax import mesh as meshes
from activedpo_jax.models import peft
from activedpo_jax.models.config import LoraConfig, ModelConfig
from activedpo_jax.models.lora import Lora, init_lora
from tests import tiny
from tests.test_hf import load_decoder, tiny_llama, torch_logps

# As `tiny_llama` makes it.
MODEL = ModelConfig(
    vocab_size=tiny.MODEL.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
)


def random_adapter(config: LoraConfig, seed: int = 0) -> Lora:
    """A and B both random, as after some training."""
    rng = np.random.default_rng(seed)
    zeros = init_lora(MODEL, config, jax.random.key(0))
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), zeros)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=8.0),
        LoraConfig(rank=4, alpha=8.0, rslora=True),
        LoraConfig(rank=2, alpha=3.5, target_modules=("v_proj", "q_proj")),
        LoraConfig(rank=3, alpha=6.0, target_modules=("o_proj", "down_proj", "up_proj"), rslora=True),
    ],
    ids=["all modules", "rsLoRA", "two modules, broken alpha", "three modules, rsLoRA"],
)
def test_peft_gives_the_same_log_probs(tmp_path: pathlib.Path, config: LoraConfig) -> None:
    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    decoder, params = load_decoder(tmp_path / "base")
    assert decoder.config == MODEL
    decoder = decoder.clone(lora=config)
    lora = random_adapter(config)
    batch = tiny.groups(seed=1, count=3, m=2)
    apply = jax.jit(decoder.apply)
    ours = np.asarray(apply({"params": params, "lora": lora}, batch))
    assert np.abs(ours - apply({"params": params}, batch)).max() > 0.1

    peft.save_adapter(lora, config, str(tmp_path / "base"), tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours, torch_logps(model, batch), rtol=0, atol=1e-4)
    # What the adapter does not hold, peft would have left at its own initialisation without a word.
    assert get_peft_model_state_dict(model).keys() == tensors(tmp_path / "adapter").keys()


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def test_the_files(tmp_path: pathlib.Path) -> None:
    config = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    lora = random_adapter(config)
    mesh = meshes.make_mesh(ml_collections.ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    sharded = jax.device_put(lora, meshes.weight_shardings(mesh, lora))
    peft.save_adapter(sharded, config, "someone/base", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/base"
    assert written["target_modules"] == ["down_proj", "q_proj"]

    found = tensors(tmp_path)
    assert len(found) == 3 * 2 * 2
    assert {t.dtype.name for t in found.values()} == {"float32"}
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    np.testing.assert_array_equal(found[name], lora["layers"]["down_proj"]["b"][2])
    # Whoever may read the one file may read the other.
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_an_adapter_is_replaced_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",))
    old, new = random_adapter(config), random_adapter(config, seed=5)
    peft.save_adapter(old, config, "base", tmp_path)
    before = tensors(tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(peft.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            peft.save_adapter(new, config, "base", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, tensors(tmp_path), before)
    peft.save_adapter(new, config, "base", tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors(tmp_path)[name], new["layers"]["q_proj"]["a"][0])


@pytest.mark.parametrize("change", [{"rank": 8}, {"target_modules": ("q_proj", "v_proj")}], ids=str)
def test_an_adapter_of_another_config_is_refused(tmp_path: pathlib.Path, change: dict[str, Any]) -> None:
    config = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",))
    with pytest.raises(ValueError, match="rank {'q_proj': 4}; its config says"):
        peft.save_adapter(random_adapter(config), dataclasses.replace(config, **change), "base", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
