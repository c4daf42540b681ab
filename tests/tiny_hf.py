"""Tiny random models of every family as transformers saves them, and the log-probs that transformers gives."""

import pathlib
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from activedpo_jax.data.groups import Groups
from activedpo_jax.huggingface import loading
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.decoder import Decoder
from tests import tiny


def tiny_model(folder: pathlib.Path, model_type: str, max_shard_size: str = "1GB", **changes: Any) -> Any:
    """A random model, far from the linear range of its attention and gates, saved to a folder."""
    torch.manual_seed(0)
    shape = {"vocab_size": tiny.MODEL.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }  # the defaults are beyond the vocabulary
    config = AutoConfig.for_model(model_type, **{**shape, **heads, **special, "initializer_range": 0.2, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            initial = parameter.detach().mean().item()  # Gemma's norms are 1 + what is saved
            torch.nn.init.uniform_(parameter, initial - 0.5, initial + 0.5)
        elif "bias" in name:
            torch.nn.init.uniform_(parameter, -1.0, 1.0)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def tiny_llama(folder: pathlib.Path, max_shard_size: str = "1GB", **changes: Any) -> Any:
    return tiny_model(folder, "llama", max_shard_size, **changes)


def torch_logps(model: Any, batch: Groups) -> np.ndarray:
    """[G, m, R]: each response after its prompt in a plain forward pass of its own, without any padding.

    The softmax is in float64: in float32, torch's of a large vocabulary errs to the same side everywhere.
    """
    groups = jax.tree.map(np.asarray, batch)
    out = np.zeros(groups.response_ids.shape)
    for g, several in enumerate(groups.response_ids):
        length = groups.prompt_len[g]
        prompt = groups.prompt_ids[g, groups.prompt_ids.shape[1] - length :]
        for j, response in enumerate(several):
            response = response[: groups.response_len[g, j]]
            ids = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.long)
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, length - 1 : -1].double().log_softmax(-1)
            out[g, j, : len(response)] = logps.gather(1, ids[0, length:, None])[:, 0].numpy()
    return out


def load_decoder(folder: pathlib.Path) -> tuple[Decoder, Any]:
    config, params = loading.load_model(str(folder))
    return Decoder(config, LoraConfig()), params


def pad(prompts: list[list[int]], responses: list[list[list[int]]]) -> Groups:
    width, length = max(map(len, prompts)), max(len(r) for rs in responses for r in rs)
    return Groups(
        np.array([[0] * (width - len(p)) + p for p in prompts], np.int32),
        np.array([len(p) for p in prompts], np.int32),
        np.array([[r + [0] * (length - len(r)) for r in rs] for rs in responses], np.int32),
        np.array([[len(r) for r in rs] for rs in responses], np.int32),
    )
