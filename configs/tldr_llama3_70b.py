"""The paper's setting with a model ten times as large: Llama-3-70B on 64 chips of TPU v5p.

    python -m activedpo_jax.main --config configs/tldr_llama3_70b.py --workdir runs/tldr_llama3_70b

on every host of the slice (`launch/` does that).  What it needs is said beforehand, without a TPU, weights or data:

    python -m activedpo_jax.main --config configs/tldr_llama3_70b.py --compile_only=v5p:4x4x4 \
        --config.model.path=configs/shapes/llama3_70b

Data, recipe and oracle are those of `tldr_llama2_7b.py`.  Weights are cut in 16 by `fsdp` and in 4 by `tensor`: with
`fsdp` alone there would have to be 64 examples at a time, and each chip would gather every layer whole.

Estimate of a round, the least at the chips' published peak numbers, in chip-hours: responses 0.415, features 0.290,
training 0.173; all 0.917.  Expected result: not run.
"""

import ml_collections

from configs import tldr_llama2_7b


def get_config() -> ml_collections.ConfigDict:
    config = tldr_llama2_7b.get_config()
    config.model.path = "meta-llama/Meta-Llama-3-70B"
    config.mesh.data = 1
    config.mesh.fsdp = 16
    config.mesh.tensor = 4
    return config
