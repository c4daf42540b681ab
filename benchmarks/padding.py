"""The share of what is computed that is text, and not padding, on real pairs with the shipped configs.

    python -m benchmarks.padding --model models/smollm2-135m --pairs PAIRS.jsonl --out benchmarks/results/padding.json

For every setting of configs/alpaca_eval_smollm2.py, and for the defaults: a pass over the pool, a pass over pairs that
are scored, and minibatches of DPO that are drawn from the pool; packed, padded to the buckets that a run adds to those
of the config (as it does on several devices), and to those of the config alone, with every batch of one size.  Nothing
is computed but numbers of tokens.
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
from activedpo_jax.data import batches, packing
from activedpo_jax.data.groups import assign_buckets

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
    config.data.packing = False
    task = specs.with_more_buckets(config, given)
    pool, size = task.pool, min(config.dpo.pairs_per_chunk, config.dpo.batch_size)
    assert pool is not None
    lengths = packing.lengths_in(pool)
    rng = np.random.default_rng(0)
    every = [np.arange(len(lengths.prompts))]
    drawn = [rng.choice(len(lengths.prompts), config.dpo.batch_size, replace=False) for _ in range(BATCHES)]

    def padded(buckets: Any, groups: list[np.ndarray], cut: Any) -> float:
        bucket_of = assign_buckets(pool, buckets)
        computed = sum(batches.computed(cut(bucket_of[rows]), buckets, 2) for rows in groups)
        return float(sum(lengths.text[rows].sum() for rows in groups) / computed)

    def packed_pass(size: int, together: bool) -> float:
        return packing.useful_share(lengths, *packing.plan(lengths, size, multiple, together))

    multiple, sizes = packing.multiple_on(jax.default_backend()), batches.sizes(size, 1)
    shapes = packing.packings(lengths, sizes, multiple)
    minibatches = [packing.minibatch(lengths.of(rows), shapes) for rows in drawn]
    text = sum(lengths.text[rows].sum() for rows in drawn)
    chunk, many = config.features.groups_per_chunk, task.buckets
    return {
        "buckets": [list(bucket) for bucket in task.buckets],
        "features": packed_pass(chunk, False),
        "scoring": packed_pass(config.evaluation.pairs_per_chunk, True),
        "DPO": float(text / sum(packing.computed(minibatch, 2) for minibatch in minibatches)),
        "pass, padded": padded(many, every, lambda b: batches.parts(b, many, 2, (chunk,))),
        "DPO, padded": padded(many, drawn, lambda b: batches.parts(b, many, 2, sizes)),
        "pass, given buckets": padded(given.buckets, every, lambda b: one_size(b, chunk)),
        "DPO, given buckets": padded(given.buckets, drawn, lambda b: one_size(b, size)),
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
