"""The share of what is computed that is text, and not padding, on real pairs with the shipped configs.

    python -m benchmarks.padding --model models/smollm2-135m --pairs PAIRS.jsonl --out benchmarks/results/padding.json

For every setting of configs/alpaca_eval_smollm2.py, and for the defaults: a pass over the pool, and minibatches of DPO
that are drawn from it; as they are, and as they would be with the buckets of the config alone and every part of one
padded to `pairs_per_chunk`.  Nothing is computed but numbers of tokens.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from activedpo_jax import flags, layout, specs, tasks
from activedpo_jax.config import default
from activedpo_jax.data import batches
from activedpo_jax.data.groups import assign_buckets
from activedpo_jax.data.ragged import lengths_of, longest_of, totals_of

BATCHES = 500


def config_of(setting: str, args: argparse.Namespace) -> ml_collections.ConfigDict:
    config = default() if setting == "defaults" else flags.load(f"configs/alpaca_eval_smollm2.py:{setting}")
    config.model.path, config.data.train, config.data.heldout = args.model, args.pairs, ""
    config.data.train_limit = config.data.heldout_limit = 0
    return config


def one_size(bucket_of: np.ndarray, size: int) -> list[batches.Part]:
    """Every bucket on its own, in parts of one size."""
    found = []
    for bucket in np.unique(bucket_of):
        members = np.flatnonzero(bucket_of == bucket)
        found += [batches.Part(int(bucket), members[i : i + size], size) for i in range(0, len(members), size)]
    return found


def shares(config: ml_collections.ConfigDict) -> dict[str, Any]:
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    given = tasks.load(config, 0, mesh, None)
    task = specs.with_more_buckets(config, given)
    pool, size = task.pool, min(config.dpo.pairs_per_chunk, config.dpo.batch_size)
    assert pool is not None
    text = lengths_of(pool.prompt_tokens) + totals_of(pool.response_tokens)
    rng = np.random.default_rng(0)
    drawn = [rng.choice(len(text), config.dpo.batch_size, replace=False) for _ in range(BATCHES)]

    def share(buckets: Any, groups: list[np.ndarray], cut: Any) -> float:
        bucket_of = assign_buckets(pool, buckets)
        computed = sum(batches.computed(cut(bucket_of[rows]), buckets, 2) for rows in groups)
        return float(sum(text[rows].sum() for rows in groups) / computed)

    chunk, every = config.features.groups_per_chunk, [np.arange(len(text))]
    return {
        "buckets": [list(bucket) for bucket in task.buckets],
        "pass": share(task.buckets, every, lambda b: batches.parts(b, task.buckets, 2, (chunk,))),
        "pass, given buckets": share(given.buckets, every, lambda b: one_size(b, chunk)),
        "DPO": share(task.buckets, drawn, lambda b: batches.parts(b, task.buckets, 2, batches.sizes(size, 1))),
        "DPO, given buckets, one size": share(given.buckets, drawn, lambda b: one_size(b, size)),
        # Both responses of a pair are padded to the longer one, whatever the bucket.
        "bound": float(text.sum() / np.sum(lengths_of(pool.prompt_tokens) + 2 * longest_of(pool.response_tokens))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="a directory with the tokenizer")
    parser.add_argument("--pairs", default="data/alpaca_eval_pairs/train.jsonl")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    found = {setting: shares(config_of(setting, args)) for setting in ("defaults", "cpu", "gpu")}
    for setting, row in found.items():
        print(setting, json.dumps(row), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"platform": jax.default_backend(), "jax": jax.__version__, "results": found}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
