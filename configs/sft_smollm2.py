"""SFT alone: SmolLM2-135M-Instruct learns the chosen responses of AlpacaEval's preferences.

    python -m activedpo_jax.sft --config configs/sft_smollm2.py --workdir runs/sft

The result is `runs/sft/adapter/`, from which a run of ActiveDPO starts with `--config.lora.path=runs/sft/adapter`; with
`--config.sft.weights=full` it is `runs/sft/model/`, for `--config.model.path=runs/sft/model`.  The recipe is the
paper's: one epoch at 2e-5.  Model and pairs are those of `configs/alpaca_eval_smollm2.py`, whose docstring says where
they are expected; others are given with `--config.model.path=MODEL --config.sft.data=PAIRS.jsonl`.

For a try on two CPU cores, add `--config.sft.limit=64 --config.sft.batch_size=4 --config.sft.examples_per_chunk=2`.
"""

import pathlib

import ml_collections

from activedpo_jax.config import default

_MODEL = pathlib.Path("models/smollm2-135m")


def get_config() -> ml_collections.ConfigDict:
    config = default()
    config.model.path = str(_MODEL) if _MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.sft.data = "data/alpaca_eval_pairs/train.jsonl"
    config.sft.heldout_fraction = 0.05
    config.lora.rank = 16  # as in the run that starts from it
    config.lora.alpha = 32.0
    config.data.buckets = ((64, 128), (128, 256), (128, 384), (256, 512))
    return config
