"""ActiveDPO on real preferences with another family: Gemma 3 270M, a base model without a chat template.

    python -m activedpo_jax.main --config configs/alpaca_eval_gemma3.py --workdir runs/alpaca_gemma3

Data and recipe are those of `alpaca_eval_smollm2.py`, which says where the pairs are expected.  The model is a Hugging
Face directory, `models/gemma3-270m`, or without it google/gemma-3-270m from the Hub, for which the licence must be
accepted first:

    hf download google/gemma-3-270m --local-dir models/gemma3-270m

One round of 8 labels from 24 pairs, for two CPU cores: it shows that a whole round works with alternating windows and a
vocabulary of 262,144, not what the model learns.
"""

import pathlib

import ml_collections

from configs import alpaca_eval_smollm2

_MODEL = pathlib.Path("models/gemma3-270m")


def get_config() -> ml_collections.ConfigDict:
    config = alpaca_eval_smollm2.get_config("cpu")
    config.strategies = ("activedpo",)
    config.model.path = str(_MODEL) if _MODEL.exists() else "google/gemma-3-270m"
    config.data.buckets = ((64, 128),)
    config.data.train_limit = 24
    config.data.heldout_limit = 16
    config.rounds = 1
    config.labels_per_round = 8
    return config
