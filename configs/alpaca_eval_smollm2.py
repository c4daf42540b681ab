"""ActiveDPO on real preferences: SmolLM2-135M-Instruct and the annotations of AlpacaEval.

    python -m activedpo_jax.main --config configs/alpaca_eval_smollm2.py:cpu --workdir runs/alpaca_cpu
    python -m activedpo_jax.main --config configs/alpaca_eval_smollm2.py:gpu --workdir runs/alpaca_gpu

Needs the model and the pairs, which the repository does not hold: a Hugging Face directory `models/smollm2-135m`, else
the Hub's HuggingFaceTB/SmolLM2-135M-Instruct is taken; and `alpaca_eval_pairs/{train,test}.jsonl` in TRL's preference
format (`prompt`, `chosen`, `rejected`), in `data/` or `../shared/data/`.  Give other places with
`--config.model.path=...`, `--config.data.train=...` and `--config.data.heldout=...`.

`cpu`: a part of the pool, two strategies, one seed; about half an hour on two cores.
`gpu`: the whole pool of 3,349 pairs, five rounds of 50, three seeds.
"""

import pathlib

import ml_collections

from activedpo_jax.config import default

_MODEL = pathlib.Path("models/smollm2-135m")
_PAIRS = pathlib.Path("data/alpaca_eval_pairs")


def get_config(setting: str = "gpu") -> ml_collections.ConfigDict:
    if setting not in ("cpu", "gpu"):
        raise ValueError(f"setting {setting!r}: expected configs/alpaca_eval_smollm2.py:cpu or ...:gpu")
    config = default()
    config.strategies = ("activedpo", "random")
    config.model.path = str(_MODEL) if _MODEL.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct"
    pairs = _PAIRS if _PAIRS.exists() else pathlib.Path("..") / "shared" / _PAIRS
    config.data.train = str(pairs / "train.jsonl")
    config.data.heldout = str(pairs / "test.jsonl")
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.dpo.learning_rate = 2e-4
    config.dpo.epochs = 4
    if setting == "cpu":
        # A quarter of the responses is longer than 256 tokens and loses its end; the run counts and says it.
        config.data.buckets = ((64, 128), (128, 192), (128, 256))
        config.rounds = 2
        config.labels_per_round = 12
        config.data.train_limit = 48
        config.data.heldout_limit = 40
        config.features.groups_per_chunk = 4
        config.evaluation.pairs_per_chunk = 4
        config.dpo.epochs = 2
        config.dpo.pairs_per_chunk = 4
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
