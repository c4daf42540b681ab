"""On-policy ActiveDPO with a Python function as the oracle: SmolLM2-135M-Instruct learns to sound positive.

    python -m activedpo_jax.main --config configs/sentiment_smollm2.py --workdir runs/sentiment \
        --config.data.train=prompts.jsonl --config.data.heldout=pairs.jsonl

The paper's own setting in small: in each of two rounds the current policy responds to 24 of the prompts, three times
each; 24 of the 72 pairs are judged by `activedpo_jax/oracles/sentiment.py`, a word list; DPO learns from all judgements
so far.  `data.train` may hold prompts alone; the held-out pairs need labels of their own.  The model is
`models/smollm2-135m`, a Hugging Face directory, else the Hub's HuggingFaceTB/SmolLM2-135M-Instruct.

About 25 minutes on two CPU cores.  `python -m benchmarks.sentiment` runs it, and rewards fresh responses to held-out
prompts before and after.
"""

import pathlib

import ml_collections

from activedpo_jax.config import default

_MODEL = pathlib.Path("models/smollm2-135m")


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.model.path = str(_MODEL) if _MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.train = "data/alpaca_eval_pairs/train.jsonl"
    config.data.heldout = "data/alpaca_eval_pairs/test.jsonl"
    config.data.heldout_limit = 8
    config.data.buckets = ((64, 48),)
    config.lora.rank = 16
    config.lora.alpha = 32.0

    config.candidates.source = "policy"
    config.candidates.prompts_per_round = 24
    config.generation.responses = 3
    config.generation.max_new_tokens = 48
    config.oracle.kind = "function"
    config.oracle.function = "activedpo_jax.oracles.sentiment:positivity"

    config.rounds = 2
    config.labels_per_round = 24
    config.features.groups_per_chunk = 4
    config.dpo.learning_rate = 2e-4
    config.dpo.epochs = 4
    config.dpo.pairs_per_chunk = 8
    config.evaluation.pairs_per_chunk = 8
    config.round.mode = "staged"
    return config
