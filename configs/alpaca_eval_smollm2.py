"""ActiveDPO on real preferences: SmolLM2-135M-Instruct and the annotations of AlpacaEval.

    python -m activedpo_jax.main --config configs/alpaca_eval_smollm2.py:cpu --workdir runs/alpaca_cpu
    python -m activedpo_jax.main --config configs/alpaca_eval_smollm2.py:gpu --workdir runs/alpaca_gpu

The repository holds neither the model nor the pairs.  The model is a Hugging Face directory, `models/smollm2-135m`, or
without it HuggingFaceTB/SmolLM2-135M-Instruct from the Hub:

    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/smollm2-135m

The pairs are `data/alpaca_eval_pairs/{train,test}.jsonl`, in TRL's preference format: `prompt`, `chosen` and `rejected`
on each line.  Others, and another model, are given by flags:

    python -m activedpo_jax.main --config configs/alpaca_eval_smollm2.py:cpu --workdir runs/mine \
        --config.model.path=MODEL --config.data.train=TRAIN.jsonl --config.data.heldout=TEST.jsonl

`cpu`: a part of the pool, two strategies, one seed; about half an hour on two cores.
`gpu`: the whole pool of 3,349 pairs, five rounds of 50, three seeds.
"""

import pathlib

import ml_collections

from activedpo_jax.config import default

_MODEL = pathlib.Path("models/smollm2-135m")


def get_config(setting: str = "gpu") -> ml_collections.ConfigDict:
    if setting not in ("cpu", "gpu"):
        raise ValueError(f"setting {setting!r}: expected configs/alpaca_eval_smollm2.py:cpu or ...:gpu")
    config = default()
    config.strategies = ("activedpo", "random")
    config.model.path = str(_MODEL) if _MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.train = "data/alpaca_eval_pairs/train.jsonl"
    config.data.heldout = "data/alpaca_eval_pairs/test.jsonl"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.dpo.learning_rate = 2e-4
    config.dpo.epochs = 4
    if setting == "cpu":
        # A quarter of the responses are longer than 256 tokens and lose their ends; the run reports how many.
        config.data.buckets = ((64, 128), (128, 192), (128, 256))
        config.rounds = 2
        config.labels_per_round = 12
        config.data.train_limit = 48
        config.data.heldout_limit = 40
        config.features.groups_per_chunk = 8
        config.evaluation.pairs_per_chunk = 8
        config.dpo.epochs = 2
        config.dpo.pairs_per_chunk = 8
    else:
        config.data.buckets = ((64, 128), (128, 256), (128, 384), (256, 512))
        config.seeds = (0, 1, 2)
        config.rounds = 5
        config.labels_per_round = 50
        config.features.groups_per_chunk = 32
        config.dpo.batch_size = 16
        config.dpo.pairs_per_chunk = 16
        config.evaluation.pairs_per_chunk = 64
    return config
