"""The adapter of the paper, rank 128 and alpha 512, and a usual one: what `peft` and torch make of it, in float64."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel

from activedpo_jax.data.groups import Groups
from activedpo_jax.evidence.gradients import normalise, response_features, sketch_gradients
from activedpo_jax.huggingface import adapters
from activedpo_jax.huggingface.families import LINEAR_MAPS
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora, init_lora
from tests import tiny
from tests.tiny_hf import load_decoder, tiny_llama, torch_logps

DIM, SEED = 512, jnp.uint32(3)


def torch_gradients(model: Any, batch: Groups, lora: Lora) -> dict[str, Any]:
    """∇ log π(y|x) with respect to PEFT's matrices of every response, in the layout of `reference_gradients`."""
    groups, m = batch.response_len.shape
    out = {
        name: {key: np.zeros((groups, m, *x.shape)) for key, x in matrices.items()}
        for name, matrices in lora["layers"].items()
    }
    weights = dict(model.named_parameters())
    for g in range(groups):
        prompt = batch.prompt_ids[g, batch.prompt_ids.shape[1] - batch.prompt_len[g] :]
        for j in range(m):
            response = batch.response_ids[g, j, : batch.response_len[g, j]]
            ids = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.long)
            logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            model.zero_grad()
            logps.gather(1, ids[0, len(prompt) :, None]).sum().backward()
            for name, matrices in out.items():
                for key, stack in matrices.items():
                    for layer in range(stack.shape[2]):
                        path = f"base_model.model.{LINEAR_MAPS[name]}.lora_{key.upper()}.default.weight"
                        stack[g, j, layer] = weights[path.format(layer=layer)].grad.numpy()
    return {"layers": jax.tree.map(jnp.float32, out)}


@pytest.fixture(params=[LoraConfig(4, 8.0), LoraConfig(128, 512.0)], ids=["rank 4", "the paper's"])
def adapted(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> tuple[Decoder, Params, Lora, Any]:
    """A tiny model with an adapter as after some training, and the same in `peft`, in float64."""
    base = tiny_llama(tmp_path / "base")
    decoder, params = load_decoder(tmp_path / "base")
    decoder = decoder.clone(lora=request.param)
    lora = init_lora(decoder.config, decoder.lora, jax.random.key(0))
    noise = np.random.default_rng(0)
    for matrices in lora["layers"].values():
        matrices["b"] = jnp.float32(0.02 * noise.standard_normal(matrices["b"].shape))
    adapters.save_adapter(lora, decoder.lora, "base", tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).double().eval()
    return decoder, params, lora, model


def test_log_probs_and_features_are_those_of_peft(adapted: tuple[Decoder, Params, Lora, Any]) -> None:
    decoder, params, lora, model = adapted
    batch = tiny.groups(seed=1, count=2, m=2)
    logps = jax.jit(decoder.apply)({"params": params, "lora": lora}, batch)
    base_logps = jax.jit(decoder.apply)({"params": params}, batch)
    assert np.abs(logps - base_logps).max() > 0.1  # the adapter does something
    assert tiny.relative_error(logps, torch_logps(model, batch)) < 1e-5

    features = jax.jit(lambda b: response_features(decoder, params, lora, b, DIM, SEED))(batch)
    expected = jax.jit(lambda g: sketch_gradients(g, DIM, SEED))(torch_gradients(model, batch, lora))
    assert tiny.relative_error(features, expected) < 1e-5


def test_bfloat16_keeps_the_direction_of_features(adapted: tuple[Decoder, Params, Lora, Any]) -> None:
    decoder, params, lora, _ = adapted
    batch = tiny.groups(seed=1, count=4, m=2)

    def directions(dtype: Any) -> np.ndarray:
        made = decoder.clone(dtype=dtype)
        return np.asarray(normalise(jax.jit(lambda b: response_features(made, params, lora, b, DIM, SEED))(batch)))

    assert np.sum(directions(jnp.bfloat16) * directions(jnp.float32), axis=-1).min() > 0.99
