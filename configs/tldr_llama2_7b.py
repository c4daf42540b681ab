"""The paper's setting on TL;DR: Llama-2-7B on 16 chips of TPU v5e, on-policy, labelled by people.

    python -m activedpo_jax.main --config configs/tldr_llama2_7b.py --workdir runs/tldr_llama2_7b

on every host of the slice (`launch/` does that).  What it needs is said beforehand, without a TPU, weights or data:

    python -m activedpo_jax.main --config configs/tldr_llama2_7b.py --compile_only=v5e:4x4 \
        --config.model.path=configs/shapes/llama2_7b

SFT on the summaries of trl-lib/tldr for one epoch at 2e-5, then rounds (arXiv 2505.19241, section 5): 1,000 prompts,
three responses each from the current policy, 50 of the 3,000 pairs to people, DPO for 4 epochs at 1e-4 on all labels
so far.  LoRA of rank 128 on all linear maps, features of 8,192 numbers.  The paper names neither the number of rounds
nor a batch size: 10 rounds, and batches of 16, so that every chip has a pair.

People answer through files: each round writes its questions and ends, and the same command takes up the answers
(README, "People").  `--config.oracle.kind=function --config.oracle.function=MODULE:FUNCTION` asks a Python function
instead.  meta-llama/Llama-2-7b-hf needs its licence to be accepted; trl-lib/tldr comes through `datasets`.

Estimate of a round, the least at the chips' published peak numbers, in chip-hours: responses 0.098, features 0.067,
training 0.047; all 0.222.  Expected result: not run.
"""

import ml_collections

from activedpo_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.data.train = "trl-lib/tldr"  # its prompts
    config.data.heldout = "trl-lib/tldr-preference"
    config.data.heldout_split = "validation"
    config.data.heldout_limit = 512
    config.data.buckets = ((512, 128),)
    config.sft.data = "trl-lib/tldr"
    config.sft.batch_size = 16
    config.sft.examples_per_chunk = 16

    config.candidates.source = "policy"
    config.candidates.prompts_per_round = 1000
    config.generation.responses = 3
    config.generation.max_new_tokens = 128
    config.oracle.kind = "people"
    config.labels_per_round = 50
    config.features.groups_per_chunk = 16
    config.dpo.batch_size = 16
    config.dpo.pairs_per_chunk = 16
    config.evaluation.pairs_per_chunk = 16

    config.mesh.data = 1
    config.mesh.fsdp = 16
    return config
