"""PEFT out: an adapter as `peft.PeftModel.from_pretrained` loads it."""

import os
import pathlib

import jax
import numpy as np
from safetensors.numpy import save

from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.families import LINEAR_MAPS
from activedpo_jax.models.lora import Lora
from activedpo_jax.workdir import write_json


def save_adapter(lora: Lora, lora_config: LoraConfig, base_model_name: str, directory: pathlib.Path) -> None:
    """Writes `adapter_model.safetensors` (float32) and `adapter_config.json`, each whole or not at all.

    Args:
      lora: {"layers": {module: {"a": [L, r, d_in], "b": [L, d_out, r]}}}.
      base_model_name: the directory or Hub name that the adapter belongs to.

    Raises:
      ValueError: the matrices are not those of `lora_config`.
    """
    layers = jax.device_get(lora["layers"])
    found = {module: matrices["a"].shape[1] for module, matrices in layers.items()}
    expected = dict.fromkeys(lora_config.target_modules, lora_config.rank)
    if found != expected:
        raise ValueError(f"the adapter has matrices of rank {found}; its config says {expected}")
    tensors = {}
    for module, matrices in layers.items():
        name = f"base_model.model.{LINEAR_MAPS[module]}"
        for key, matrix in (("lora_A", matrices["a"]), ("lora_B", matrices["b"])):
            for layer, one in enumerate(matrix):
                tensors[f"{name.format(layer=layer)}.{key}.weight"] = np.ascontiguousarray(one, np.float32)

    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "adapter_model.safetensors.partial"
    with open(partial, "wb") as file:  # not `save_file`, whose files only their owner can read
        file.write(save(tensors, metadata={"format": "pt"}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, directory / "adapter_model.safetensors")
    alpha = lora_config.alpha
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name,
            "r": lora_config.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "use_rslora": lora_config.rslora,
            "target_modules": sorted(layers),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
