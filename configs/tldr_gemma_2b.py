"""The paper's setting on TL;DR: Gemma-2B on 8 chips of TPU v5e, on-policy, labelled by people.

    python -m activedpo_jax.main --config configs/tldr_gemma_2b.py --workdir runs/tldr_gemma_2b

on the one host of the slice.  What it needs is said beforehand, without a TPU, weights or data:

    python -m activedpo_jax.main --config configs/tldr_gemma_2b.py --compile_only=v5e:2x4 \
        --config.model.path=configs/shapes/gemma_2b

Data, recipe and oracle are those of `tldr_llama2_7b.py`, in batches of 8.  google/gemma-2b needs its licence to be
accepted.

Estimate of a round, the least at the chips' published peak numbers, in chip-hours: responses 0.046, features 0.023,
training 0.016; all 0.087.  Expected result: not run.
"""

import ml_collections

from configs import tldr_llama2_7b


def get_config() -> ml_collections.ConfigDict:
    config = tldr_llama2_7b.get_config()
    config.model.path = "google/gemma-2b"
    config.sft.batch_size = 8
    config.sft.examples_per_chunk = 8
    config.features.groups_per_chunk = 8
    config.dpo.batch_size = 8
    config.dpo.pairs_per_chunk = 8
    config.mesh.data = 1
    config.mesh.fsdp = 8
    return config
