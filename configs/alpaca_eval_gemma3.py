"""ActiveDPO on real preferences with another family: Gemma 3 270M, a base model without a chat template.

    python -m activedpo_jax.main --config configs/alpaca_eval_gemma3.py --workdir runs/alpaca_gemma3

As `alpaca_eval_smollm2.py`, from which it takes the data and the recipe; the model is `models/gemma3-270m`, a Hugging
Face directory, else the Hub's google/gemma-3-270m.  One round of 8 labels from 24 pairs, for two CPU cores: it shows
that the whole round goes through, with alternating windows and a vocabulary of 262,144, not what it teaches.
"""

import pathlib

import ml_collections

from configs.alpaca_eval_smollm2 import get_config as smollm2

_MODEL = pathlib.Path("models/gemma3-270m")


def get_config() -> ml_collections.ConfigDict:
    config = smollm2("cpu")
    config.strategies = ("activedpo",)
    config.model.path = str(_MODEL) if _MODEL.exists() else "google/gemma-3-270m"
    config.data.buckets = ((64, 128),)
    config.data.train_limit = 24
    config.data.heldout_limit = 16
    config.rounds = 1
    config.labels_per_round = 8
    return config
