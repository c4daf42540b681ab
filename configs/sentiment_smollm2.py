"""On-policy ActiveDPO with a Python function as the oracle: SmolLM2-135M-Instruct learns to sound positive.

    python -m activedpo_jax.main --config configs/sentiment_smollm2.py --workdir runs/sentiment

The paper's own setting in small: in each of two rounds the current policy responds to 36 prompts of
`configs/sentiment/prompts.jsonl`, three times each; 32 of the 108 pairs are judged by a word list,
`activedpo_jax/oracles/sentiment.py`; DPO learns from all judgements so far.  The model is `models/smollm2-135m`, a
Hugging Face directory, else the Hub's HuggingFaceTB/SmolLM2-135M-Instruct.

`python -m benchmarks.sentiment` runs it on two CPU cores, and rewards fresh responses to held-out prompts before and
after; `benchmarks/README.md` has the result.
"""

import pathlib

import ml_collections

from activedpo_jax.config import default

_MODEL = pathlib.Path("models/smollm2-135m")


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.model.path = str(_MODEL) if _MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.train = "configs/sentiment/prompts.jsonl"
    config.data.heldout = "configs/sentiment/heldout.jsonl"
    config.data.buckets = ((64, 32),)
    config.lora.rank = 16
    config.lora.alpha = 32.0

    config.candidates.source = "policy"
    config.candidates.prompts_per_round = 36
    config.generation.responses = 3
    config.generation.max_new_tokens = 32
    config.oracle.kind = "function"
    config.oracle.function = "activedpo_jax.oracles.sentiment:positivity"

    config.rounds = 2
    config.labels_per_round = 32
    config.features.groups_per_chunk = 6
    config.dpo.learning_rate = 5e-4
    config.dpo.epochs = 4
    config.dpo.pairs_per_chunk = 8
    config.evaluation.pairs_per_chunk = 8
    config.round.mode = "staged"
    return config
