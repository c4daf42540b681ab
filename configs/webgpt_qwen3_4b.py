"""The paper's setting on WebGPT: Qwen3-4B on 8 chips of TPU v5e, on-policy, labelled by people.

    python -m activedpo_jax.main --config configs/webgpt_qwen3_4b.py --workdir runs/webgpt_qwen3_4b

on the one host of the slice.  What it needs is said beforehand, without a TPU, weights or data:

    python -m activedpo_jax.main --config configs/webgpt_qwen3_4b.py --compile_only=v5e:2x4 \
        --config.model.path=configs/shapes/qwen3_4b

`data/webgpt/{train,test}.jsonl` hold the comparisons of openai/webgpt_comparisons in TRL's preference format, a line
each: `prompt`, the question's `full_text`; `chosen` and `rejected`, the answers with the larger and the smaller score,
without the comparisons whose scores are equal.  SFT learns the chosen answers; the rounds take the prompts, and the
policy's own answers.  Recipe and oracle are those of `tldr_llama2_7b.py`, in batches of 8; answers are as long as 256
tokens, without thinking.

Estimate of a round, the least at the chips' published peak numbers, in chip-hours: responses 0.139, features 0.031,
training 0.028; all 0.202.  Expected result: not run.
"""

import ml_collections

from configs import tldr_llama2_7b


def get_config() -> ml_collections.ConfigDict:
    config = tldr_llama2_7b.get_config()
    config.model.path = "Qwen/Qwen3-4B"
    config.data.train = config.sft.data = "data/webgpt/train.jsonl"
    config.data.heldout = "data/webgpt/test.jsonl"
    config.data.template_kwargs = '{"enable_thinking": false}'
    config.data.buckets = ((128, 256),)
    config.generation.max_new_tokens = 256
    config.sft.batch_size = 8
    config.sft.examples_per_chunk = 8
    config.features.groups_per_chunk = 8
    config.dpo.batch_size = 8
    config.dpo.pairs_per_chunk = 8
    config.mesh.data = 1
    config.mesh.fsdp = 8
    return config
